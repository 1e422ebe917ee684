"""Latent shards: posterior moments and labels in tar (webdataset) or MDS (mosaicml-streaming) files with a manifest."""

from ldt.data.shards.manifest import Manifest, open_validation
from ldt.data.shards.reader import LatentShards, Records, open_shards

__all__ = ["LatentShards", "Manifest", "Records", "open_shards", "open_validation"]
