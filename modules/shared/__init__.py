"""What several of the LightningModules use."""
