"""Encode images into latent shards: posterior moments, labels and a manifest.

Runs on one process or many (torchrun, srun): each output shard is a unit of its own, so any number of processes give
the same files, and running the command again after a stop or a kill goes on with the shards that are missing.
"""

from ldt import log
from ldt.cluster.gpus import choose_arithmetic
from ldt.dist import SLOWEST_RANK_TIMEOUT, process_group
from ldt.encoding.buckets import encode_buckets
from ldt.encoding.config import EncodeJob
from ldt.encoding.encoder import Encoder
from ldt.encoding.index import index_shards

__all__ = ["EncodeJob", "run"]


def run(config: EncodeJob) -> int:
    """Encode the images, latents or foreign shards that the job names; returns the exit code."""
    with process_group(timeout=SLOWEST_RANK_TIMEOUT) as world:  # they meet when all is encoded
        log.configure(world.rank)
        choose_arithmetic()
        if config.index:
            index_shards(config, world)
        elif config.images.buckets:
            encode_buckets(config, world)
        else:
            Encoder(config, world).run()
    return 0
