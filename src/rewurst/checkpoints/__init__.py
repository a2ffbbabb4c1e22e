"""Checkpoints on disk: written atomically, whole or sharded, and the newest one of a run."""
