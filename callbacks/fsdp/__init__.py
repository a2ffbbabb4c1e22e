"""FSDP2 for any LightningModule: the strategy, its choice of blocks, and distribution of weights."""
