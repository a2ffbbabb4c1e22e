"""Options of the Lightning commands that LightningCLI does not have, and names that it would not find."""
