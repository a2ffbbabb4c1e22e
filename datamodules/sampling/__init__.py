"""Which sample fills which slot of a global batch: pure functions of the step."""
