"""A small but complete run to sample from and to score: real checkpoints, autoencoder and images, nothing trained."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldt.checkpoint.manifest import TrainState
from ldt.checkpoint.writer import Content, Writer
from ldt.config import to_dict
from ldt.data.latent_spec import LatentSpec
from ldt.data.shards.manifest import VERSION, head_hash
from ldt.diffusion.config import ObjectiveConfig
from ldt.dist import process_group
from ldt.engine.config import EngineConfig, OptimizerConfig
from ldt.engine.engine import Engine
from ldt.models.autoencoder import Autoencoder
from ldt.nn.build import build
from ldt.nn.config import ModelConfig

CLASSES = ["boot", "coat", "shirt"]


def shared_run(factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 1000 and 2000 samples, made once a session, on 90 images in three classes."""
    root = factory.getbasetemp() / "small"
    if not root.exists():  # in a process of its own: DeepSpeed stands only one process group in its life
        done = forked.run("-c", "import pathlib, run_data, sys; run_data.make_run(pathlib.Path(sys.argv[1]))", root)
        assert done.returncode == 0, done.stderr
    return root / "run"


def make_run(root: Path) -> None:
    autoencoder = make_autoencoder(root / "autoencoder")
    make_images(root / "images", 90)
    make_manifest_head(root / "shards", root / "images")
    spec = LatentSpec(
        latent_shape=(4, 8, 8),
        classes=CLASSES,
        mean_C=[0.1, -0.2, 0.0, 0.3],
        std_C=[1.0, 0.9, 1.1, 1.2],
        autoencoder=str(root / "autoencoder"),
        autoencoder_hash=autoencoder.hash,
        image_size=32,
        image_channels=1,
    )
    model = ModelConfig(width=32, depth=2, heads=2)
    config = {
        "model": to_dict(model),
        "objective": to_dict(ObjectiveConfig()),
        "data": {"path": str(root / "shards")},
        "evaluate": {"images": 60, "steps": 2, "block": 30, "cache_dir": str(root / "cache")},
    }
    (root / "run").mkdir()
    (root / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    denoiser = randomised(build(model, spec.latent_shape, len(CLASSES), seed=0))
    with process_group() as world:
        engine = Engine(denoiser, EngineConfig(zero_stage=0), OptimizerConfig(), world, 1)
        masters = [f.master for f in engine.partition.owned]
        kinds = {"master": masters, "ema": [m.clone() for m in masters]}
        with Writer(engine.partition, world) as writer:
            for samples_seen in (1000, 2000):
                progress = asdict(TrainState(samples_seen, data_fingerprint="test", attempt=1))
                facts = {"progress": progress, "sampling": spec.to_json(), "config": config}
                writer.begin([Content(root / "run" / "checkpoints", kinds)], facts)
                writer.finish()
                for average in kinds["ema"]:
                    average.mul_(0.8)


def randomised(denoiser: torch.nn.Module) -> torch.nn.Module:
    """Random weights throughout: a fresh denoiser's output layer is zero and would hide every mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (p for p in denoiser.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return denoiser


def make_autoencoder(path: Path) -> Autoencoder:
    """A random AutoencoderKL, 1×32×32 ↔ 4×8×8, in diffusers' layout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderKL
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4}
        network = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            **blocks,
        )
    network.save_pretrained(path)
    return Autoencoder.load(str(path))


def make_images(path: Path, count: int) -> None:
    """Grey 28 × 28 noise of three brightnesses, one directory a class."""
    generator = np.random.default_rng(0)
    for i in range(count):
        folder = path / CLASSES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(40 * (i % 3), 120 + 40 * (i % 3), (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")


def opened(path: Path) -> Image.Image:
    """A picture read whole, its file closed."""
    with Image.open(path) as image:
        image.load()
    return image


def make_manifest_head(path: Path, images: Path) -> None:
    """The part of a shard directory that evaluation reads: where the images came from."""
    path.mkdir(parents=True)
    recipe = {"images.path": str(images), "images.fit": "pad"}
    head = {"kind": "ldt latent shards", "version": VERSION, "recipe": recipe}
    head["head_xxh64"] = head_hash(head)
    (path / "manifest.json").write_text(json.dumps(head))
