"""Optimizers with 8-bit states, Muon, and the choice of one by name."""
