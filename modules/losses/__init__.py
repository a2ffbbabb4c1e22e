"""Losses: chunked cross-entropy, perceptual, adversarial."""
