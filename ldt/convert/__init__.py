"""Doors to other projects: their weights and latents come in, our models go out in their form."""
