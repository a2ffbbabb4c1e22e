"""The papers' experiments again, at a scale of one's own: runs, claims tested against the seeds' spread, a report."""
