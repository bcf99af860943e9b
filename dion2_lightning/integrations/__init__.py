"""What stands on top of the package for one framework each; nothing in the package depends on it."""
