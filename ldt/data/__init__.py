"""Images, latent shards, the order in which samples are read, and the loader."""
