"""Monitoring of a run: throughput, progress, TensorBoard's layout, hyperparameters."""
