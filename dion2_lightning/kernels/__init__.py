"""Arithmetic on tensors of one rank: selection, orthonormalization, precision."""
