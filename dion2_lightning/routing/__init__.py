"""What each parameter of a model is, and why."""
