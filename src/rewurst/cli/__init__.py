"""The command line: LightningCLI and the tools next to it."""
