"""Supervised fine-tuning of a causal language model with Dion2, in Lightning, Accelerate and the Trainer."""
