"""ldt: distributed training of latent diffusion Transformers."""
