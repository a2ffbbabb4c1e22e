"""The memory plan: what a training step of a config has to hold on each device."""
