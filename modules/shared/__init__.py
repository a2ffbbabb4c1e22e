"""Building blocks that several of the LightningModules share."""
