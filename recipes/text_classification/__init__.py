"""Fine-tune an encoder for text classification with Dion2, next to its AdamW control."""
