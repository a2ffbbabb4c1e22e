"""Comparison of the cascade with a single stage of the same size at equal training FLOPs."""
