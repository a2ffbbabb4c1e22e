"""The work of a preparation: tokenizing, recoding, encoding latents."""
