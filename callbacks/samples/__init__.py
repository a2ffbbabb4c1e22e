"""Sample images and texts during training, and scores of images."""
