"""Sources of a preparation: documents, pictures, built-in data."""
