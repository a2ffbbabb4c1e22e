"""Evaluation of trained models: language models and cascades."""
