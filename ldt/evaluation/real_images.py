"""The real images that generated ones are compared with, each at its size, or at that of its bucket."""

from typing import Any

from ldt.checkpoint.load import Loaded
from ldt.data.images import ImageSource, open_encoded, open_images
from ldt.data.images.bucket_rule import Size
from ldt.data.images.open import open_encoded_buckets
from ldt.data.shards.buckets import read_buckets
from ldt.data.shards.manifest import read_head
from ldt.errors import InputError
from ldt.evaluation.config import ALL, EvaluateConfig, is_images
from ldt.metrics.image_set import ImageSet


def real_images(config: EvaluateConfig, loaded: Loaded) -> list[ImageSet]:
    """The real images to compare with, at the sizes of the generated ones."""
    path, channels = config.reference, loaded.spec.image_channels
    if is_images(path):
        if config.size == ALL:
            raise InputError(
                f"evaluate.reference={path} is of images that are in no bucket, and evaluate.size={ALL} compares "
                f"bucket with bucket; score one (evaluate.size={next(iter(loaded.spec.buckets))}), leave "
                "evaluate.reference out, or give data in buckets or an .npz of statistics"
            )
        return [ImageSet(open_images(path), *_size(config, loaded), channels, config.fit)]
    shards = path or _own_data(loaded)
    buckets = read_buckets(shards)
    if config.size == ALL:
        if buckets is None:
            raise InputError(f"evaluate.size={ALL} needs data in buckets, and {shards} holds one size; leave it out")
        recipe = _recipe(f"{shards.rstrip('/')}/{next(iter(buckets))}")
        sources, fit = open_encoded_buckets(recipe), recipe["images.fit"]
        sizes = [Size.parse(name, shards) for name in buckets]
        return [ImageSet(sources[size], *size, channels, fit) for size in sizes]
    if buckets is not None:
        if config.size not in buckets:
            raise InputError(
                f"{shards} has several sizes: evaluate.size={config.size} has to be one of {', '.join(buckets)}, or "
                f"{ALL} (several, separated by commas, end in a table)"
            )
        shards = f"{shards.rstrip('/')}/{config.size}"
    source, fit = images_of_shards(shards)
    return [ImageSet(source, *_size(config, loaded), channels, fit)]


def images_of_shards(shards: str) -> tuple[ImageSource, str]:
    """The images that latent shards were encoded from, and how they came to size."""
    recipe = _recipe(shards)
    return open_encoded(recipe), recipe["images.fit"]


def _recipe(shards: str) -> dict[str, Any]:
    recipe: dict[str, Any] = read_head(shards)["recipe"]
    if "images.path" not in recipe:
        raise InputError(
            f"the data in {shards} do not say which images they were encoded from; give images as reference, and fit"
        )
    return recipe


def _size(config: EvaluateConfig, loaded: Loaded) -> tuple[int, int]:
    return Size.parse(config.size, "evaluate.size") if config.size else loaded.spec.image_shape


def _own_data(loaded: Loaded) -> str:
    """Where the data of the run are."""
    data = loaded.config.get("data", {})
    if not data:
        raise InputError(
            f"{loaded.path} does not know which data it was trained on, as an imported model; give "
            "evaluate.reference and evaluate.fit"
        )
    if data.get("sources"):
        raise InputError(
            "the run was trained on several data.sources; say with evaluate.reference which images to compare with"
        )
    return str(data["path"])
