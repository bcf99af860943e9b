"""Preferences and reinforcement with TRL's DPOTrainer and GRPOTrainer, and Dion2."""
