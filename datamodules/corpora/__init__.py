"""What a folder of shards contains, and its rows by position."""
