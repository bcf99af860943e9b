"""Pretrain a small causal language model from scratch with Accelerate and Dion2."""
