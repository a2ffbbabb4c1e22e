"""Decoding of image files, their facts and filters, crops and captions."""
