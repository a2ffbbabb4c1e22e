"""Learning-rate schedules and the callback that re-warms the rate when the dataset changes."""
