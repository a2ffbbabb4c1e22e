"""Reproduction of the experiments on continual pre-training."""
