"""Preparation of corpora: text, images and latents into shards."""
