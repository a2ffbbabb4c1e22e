"""Reproduce the papers' experiments at a chosen scale: run them, test the claims over several seeds, write a report."""
