"""One file for each algorithm's update, and what all of them have in common."""
