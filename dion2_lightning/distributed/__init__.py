"""One matrix on several ranks: collectives, owners, process groups, clipping. Knows no algorithm."""
