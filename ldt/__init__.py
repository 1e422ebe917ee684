"""ldt: distributed training of latent diffusion Transformers."""

__version__ = "0.1.0"
