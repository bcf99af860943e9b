"""What belongs to one training framework; each file imports its own, and nothing imports these files but the user."""
