"""Contents of a folder of shards, and access to its rows by position."""
