"""Sample pictures and texts during training, and scores of pictures."""
