"""Tars that others wrote, read from front to back without an index."""
