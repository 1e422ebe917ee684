"""Latent shards: posterior moments and labels in tar (webdataset) or MDS (mosaicml-streaming) files with a manifest."""

from ldt.data.shards.buckets import BucketShards
from ldt.data.shards.manifest import Manifest, open_validation
from ldt.data.shards.reader import LatentShards, Records, open_shards
from ldt.data.shards.sources import MixedShards, Shards

__all__ = [
    "BucketShards",
    "LatentShards",
    "Manifest",
    "MixedShards",
    "Records",
    "Shards",
    "open_shards",
    "open_validation",
]
