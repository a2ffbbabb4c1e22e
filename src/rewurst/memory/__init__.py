"""Plan the memory that a config's training step needs on each device."""
