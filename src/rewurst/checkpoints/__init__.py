"""Checkpoints on disk: atomic and sharded writing, reading, and finding the newest one of a run."""
