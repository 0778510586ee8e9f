"""A checkpoint -> a trainable model with documents kept apart."""
