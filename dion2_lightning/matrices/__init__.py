"""Which matrices a parameter holds, and which part of them is on this rank."""
