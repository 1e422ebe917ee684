"""Names of the files in a directory of latent shards."""

HEAD, TABLE = "manifest.json", "shards.npy"
BUCKETS = "buckets.json"  # instead of a head, where each sub-directory holds the samples of one latent shape
RECIPE = "encode.json"  # marks a directory that is being encoded; gone when it is whole
VALIDATION = "validation"  # the sub-directory of the held-out split
