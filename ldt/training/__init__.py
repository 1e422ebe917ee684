"""Training: the trainer, its config, its data and what it watches of itself."""
