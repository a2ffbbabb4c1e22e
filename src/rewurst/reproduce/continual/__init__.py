"""The experiments on continual pre-training."""
