"""What a preparation reads: documents, pictures, built-in data."""
