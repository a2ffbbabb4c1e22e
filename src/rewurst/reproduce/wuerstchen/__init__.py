"""The cascade against a single stage of the same size, at equal training FLOPs."""
