"""From a prompt to pictures with trained stages, and their exchange with diffusers."""
