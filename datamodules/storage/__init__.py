"""Random access to the bytes of local files and, through a block cache, of remote ones."""
