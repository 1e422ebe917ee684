"""Images to latent shards."""
