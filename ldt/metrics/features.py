"""Features of images that come in blocks, on all ranks together, while the next block is being made."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from ldt import log
from ldt.cluster.gpus import use_device
from ldt.dist import World, barrier
from ldt.metrics.detectors import Detector
from ldt.metrics.feature_store import FeatureStore


def store_features(
    store: FeatureStore,
    detector: Detector,
    wanted_K: Sequence[int],
    produce: Callable[[int], Tensor],
    world: World,
    title: str,
) -> int:
    """Put the features of the first `wanted_K[k]` images of every block k into the store; returns how many blocks.

    produce: block k as uint8 [B, H, W, C]. The detector always sees whole blocks, because the last bits of its features
    depend on the size of its batch: what is not wanted of them is dropped. While a block is made, a thread looks at the
    last one.
    """
    blocks = len(wanted_K)

    def detect(k: int, image_BHWC: Tensor) -> None:
        store.write(k, {name: value[: wanted_K[k]] for name, value in detector(image_BHWC).arrays().items()})

    # on a CPU whose cores all have a process, a second thread only gets in the way
    overlap = world.device.type == "cuda" or len(os.sched_getaffinity(0)) > world.local_size
    missing = [k for k in range(world.rank, blocks, world.size) if not store.has(k)]
    with (
        ThreadPoolExecutor(1, initializer=use_device, initargs=(world.device,)) as thread,
        log.progress(sum(wanted_K), "img", title, show=world.rank == 0) as bar,
    ):
        pending: Future[None] | None = None
        for k in missing:
            image_BHWC = produce(k)
            if pending is not None:
                pending.result()
            pending = thread.submit(detect, k, image_BHWC)
            if not overlap:
                pending.result()
            bar.update(wanted_K[k] * world.size)
        if pending is not None:
            pending.result()
    barrier()
    return blocks


def block_sizes(images: int, block: int) -> list[int]:
    """How many images each block has: `block`, and the last one what is left."""
    return [min(block, images - start) for start in range(0, images, block)]
