"""Shards that another program wrote, checked sample by sample and given a manifest: `ldt encode index=DIR`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldt.data.shards import adopt
from ldt.data.shards.manifest import Manifest, make_table
from ldt.data.shards.statistics import Sums
from ldt.dist import World, all_gather, on_rank_zero, together
from ldt.encoding.config import EncodeJob
from ldt.errors import InputError
from ldt.files import class_names
from ldt.models.autoencoder import Autoencoder
from ldt.models.text_encoder import describe, load_text_encoder
from ldt.nn.text_shape import TextShape


def index_shards(config: EncodeJob, world: World) -> None:
    """Check every sample of shards written elsewhere, divided among ranks, and write their manifest."""
    directory = Path(config.index)
    autoencoder = Autoencoder.load(config.autoencoder)
    format, names = on_rank_zero(world, lambda: adopt.find_shards(directory))
    layout = on_rank_zero(world, lambda: adopt.read_layout(directory, names[0], format))
    if layout.latent_shape[0] != autoencoder.latent_channels:
        raise InputError(
            f"index={directory} holds latents of {layout.latent_shape[0]} channels, autoencoder={config.autoencoder} "
            f"makes {autoencoder.latent_channels}; give the autoencoder that they come from"
        )
    if layout.posterior and not autoencoder.posterior:
        raise InputError(
            f"index={directory} holds a mean and a standard deviation, and autoencoder={config.autoencoder} "
            f"({autoencoder.kind}) has no posterior; give the autoencoder that they come from"
        )
    text: dict[str, Any] = {}
    if layout.text:
        if not config.text.encoder:
            raise InputError(f"index={directory} holds encoded captions; say by what, as in text.encoder=bytes")
        text = describe(load_text_encoder(config.text.encoder, layout.text.length, world.device)) | {"examples": []}
        layout = replace(layout, text=TextShape(text["length"], text["width"], text["vocabulary"]))
    elif config.text.encoder:
        there = "captions, but not what an encoder made of them" if layout.captions else "no captions"
        raise InputError(
            f"index={directory} holds {there}, and nothing is encoded by index=; leave out "
            f"text.encoder={config.text.encoder}, or encode the images with it"
        )
    by_element, share = config.whitening == "element", names[world.rank :: world.size]
    mine = together(lambda: [adopt.examine(directory, name, format, layout, by_element) for name in share])
    sidecars = sorted((s for part in all_gather(mine) for s in part), key=lambda s: s.name)

    def finish() -> None:
        adopt.refuse_duplicates(directory, sidecars)
        classes = class_names(directory, max(len(s.class_counts) for s in sidecars) - 1)
        counts = np.zeros(len(classes), np.int64)
        for s in sidecars:
            counts[: len(s.class_counts)] += s.class_counts
        Manifest(
            format=format,
            latent_shape=layout.latent_shape,
            dtype=layout.dtype,
            flips=layout.flips,
            classes=classes,
            class_counts=counts.tolist(),
            **Sums.total(s.sums for s in sidecars).facts(layout.latent_shape),
            autoencoder=config.autoencoder,
            autoencoder_hash=autoencoder.hash,
            image_size=layout.latent_shape[1] * autoencoder.downsample,
            image_channels=autoencoder.image_channels,
            table=make_table([s.row for s in sidecars]),
            recipe={"index": True},
            captions=layout.captions,
            posterior=layout.posterior,
            text=text,
        ).save(directory)
        samples = sum(s.samples for s in sidecars)
        print(f"{samples:,} samples in {len(sidecars):,} {format} shards checked and indexed")
        print(f"latent shards: {directory}")

    on_rank_zero(world, finish)
