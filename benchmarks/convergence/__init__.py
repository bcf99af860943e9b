"""AdamW, Muon and Dion2 next to each other, each tuned alike, on tasks that a laptop trains and a GPU scales up."""
