"""FSDP2 for any LightningModule: the strategy, which blocks it shards, and how weights get in and out."""
