"""A run's model for others: a folder for diffusers, plain weights, or a graph; each with a model card."""
