"""What the causal language model needs of transformers."""
