"""Where a preparation writes: shards, sidecars, indices."""
