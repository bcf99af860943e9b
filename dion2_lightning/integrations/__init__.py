"""What one training framework asks for, a file for each; each imports its own framework, on first use."""
