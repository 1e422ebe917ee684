"""The keys of an evaluation."""

from dataclasses import dataclass, field
from pathlib import Path

from ldt.config_fields import choice, path_field
from ldt.data.images.npz import holds_images
from ldt.data.shard_files import BUCKETS, HEAD
from ldt.errors import InputError
from ldt.sampling.config import DrawConfig

ALL = "all"  # sizes


@dataclass
class MeasureConfig:
    """What images are measured by.

    `metrics`: of frechet, spatial_frechet, inception_score, kernel, mmd_rbf, mind, precision_recall, caption_retrieval.
    `weights_file`: of the inception and timm detectors; `resize`: of inception; `model`: of timm. `cache_dir`: where
    statistics of real images are kept.
    """

    metrics: list[str] = field(default_factory=lambda: ["frechet"])
    detector: str = choice("efficientnet_lite0", "inception", "timm")
    model: str = "vit_large_patch14_dinov2.lvd142m"
    weights_file: str = path_field()
    resize: str = choice("tensorflow", "bilinear", "clean")
    cache_dir: str = path_field("~/.cache/ldt/references")


@dataclass
class EvaluateConfig(DrawConfig, MeasureConfig):
    """How checkpoints are scored.

    `checkpoint`: newest, all, or one's number of samples. `reference`: real images (all that images.path takes, brought
    to size by `fit`), latent shards (the images behind them) or an .npz of statistics; empty for the images that the
    run's data were encoded from. `size`: that of one bucket, or `all` (the same as none) for all buckets of the run,
    each with its share of the images, in one score. `output`: the evaluations.jsonl to write, empty for the run's.
    """

    images: int = 50_000
    checkpoint: str = "newest"
    reference: str = path_field()
    fit: str = choice("as_encoded", "crop", "pad")
    output: str = path_field()

    def check_size(self) -> None:
        if self.size != ALL:
            super().check_size()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 2:
            raise InputError(f"evaluate.images={self.images} must be at least 2; published scores use 50000")
        if is_images(self.reference) and self.fit == "as_encoded":
            raise InputError(
                f"evaluate.reference={self.reference} needs evaluate.fit=crop or pad: how its images come to the "
                "size of the generated ones"
            )
        if not is_images(self.reference) and self.fit != "as_encoded":
            raise InputError(f"evaluate.fit={self.fit} belongs to images given as evaluate.reference")


def is_images(reference: str) -> bool:
    """Whether a reference is a set of images, rather than statistics, latent shards or the run's own data."""
    if not reference or is_statistics(reference):
        return False
    return not any((Path(reference) / name).exists() for name in (HEAD, BUCKETS))


def is_statistics(reference: str) -> bool:
    """Whether a reference is an .npz of statistics; one that holds images alone is a set of images."""
    return reference.endswith(".npz") and not holds_images(reference)
