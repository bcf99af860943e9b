"""What was selected: counters, metrics, history, pictures, report."""
