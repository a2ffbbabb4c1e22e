"""Choice of the sample in each slot of a global batch, by pure functions of the step."""
