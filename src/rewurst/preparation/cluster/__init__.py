"""Preparation in resumable units, on many machines."""
