"""Bytes by position, from local files and from remote ones through a block cache."""
