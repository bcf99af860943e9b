"""Train a Vision Transformer with the Hugging Face Trainer and Dion2, next to its AdamW control."""
