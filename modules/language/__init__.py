"""Helpers of the causal language model around transformers."""
