"""Draw images from a checkpoint: a grid, a folder of PNGs, or one .npz."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldt import log
from ldt.checkpoint.checkpoint import results_of
from ldt.checkpoint.load import Loaded, load_denoiser
from ldt.cluster.gpus import choose_arithmetic
from ldt.config import to_dict
from ldt.config_fields import choice, path_field, required_path_field
from ldt.dist import SLOWEST_RANK_TIMEOUT, World, broadcast, in_block_order, process_group
from ldt.errors import InputError, by_reason
from ldt.files import unwritable
from ldt.image_files import WRITERS
from ldt.paths import local_path
from ldt.sampling.config import DrawConfig
from ldt.sampling.draw import ImageModel, block_ids, default_labels, image_model, load_guide, resized, sample_images


@dataclass
class SampleJob(DrawConfig):
    """`run`: a run directory (its newest checkpoint) or a checkpoint; `classes`: names or numbers, none for all.

    `prompts`: captions for a denoiser of text, image i has prompt i mod their number; a file name ending in .txt stands
    for its lines. Without them some captions of the training data are used; with them, and no `classes`, no class is
    told.
    """

    run: str = required_path_field()
    images: int = 80
    classes: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    format: str = choice("grid", "folder", "npz")
    output: str = path_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1:
            raise InputError(f"images={self.images} must be at least 1")


def run(config: SampleJob) -> int:
    """Draw the images on all ranks; rank 0 writes them."""
    choose_arithmetic()
    with process_group(timeout=SLOWEST_RANK_TIMEOUT) as world:
        loaded = load_denoiser(config.run, config.weights, world.device)
        guide = load_guide(config, loaded, world.device)
        model = image_model(loaded, config.precision, world.device, config.compile, guide)
        model = resized(model, loaded.config, config.size)
        output = _output(config, loaded, world)
        blocks, labels = draw(model, loaded.config, config, world)
        with log.progress(config.images, "img", "sample", show=world.rank == 0) as bar:
            blocks = _counted(blocks, bar.update)
            if world.rank == 0:
                record = {"samples_seen": loaded.samples_seen, "checkpoint_hash": loaded.hash, **to_dict(config)}
                record["prompts"] = _prompts(config.prompts, model)
                WRITERS[config.format](output, blocks, labels, record)
            else:
                deque(blocks, maxlen=0)
        if world.rank == 0:
            print(f"{config.images} images of the checkpoint at {loaded.samples_seen} samples: {output}")
    return 0


def draw(
    model: ImageModel, trained: dict[str, Any], config: SampleJob, world: World | None = None
) -> tuple[Iterator[NDArray[np.uint8]], NDArray[np.int64]]:
    """Images 0 to config.images − 1 as blocks uint8 [B, H, W, C] in order, and their labels int64 [N].

    trained: the config of the denoiser's training. The ranks of `world` share the work, and each gets all blocks.
    """
    if config.classes and trained["model"].get("condition_on") == "text":
        raise InputError("classes= needs a denoiser of classes, and this one was trained with text only; use prompts=")
    classes = model.spec.classes
    chosen = np.array(_chosen_classes(config.classes, classes), np.int64)
    prompts = _prompts(config.prompts, model)

    def labels(ids: Sequence[int]) -> NDArray[np.int64]:
        if len(chosen):
            return chosen[np.asarray(ids) % len(chosen)]
        return np.full(len(ids), len(classes)) if prompts else default_labels(model, ids, config)

    def produce(k: int) -> NDArray[np.uint8]:
        ids = block_ids(k, config.block)
        return sample_images(model, ids, config, labels(ids), prompts).numpy()[: config.images - ids.start]

    blocks, world = -(-config.images // config.block), world or World(0, 1, 0, 1, model.device)
    return in_block_order(blocks, produce, world), labels(range(config.images))


def _counted(blocks: Iterator[NDArray[np.uint8]], update: Callable[[int], object]) -> Iterator[NDArray[np.uint8]]:
    for block_NHWC in blocks:
        yield block_NHWC
        update(len(block_NHWC))


def _chosen_classes(wanted: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The numbers of the requested classes, which may be given by name or by number."""
    chosen = []
    for word in wanted:
        if word in classes:
            chosen.append(classes.index(word))
        elif word.isdigit() and int(word) < len(classes):
            chosen.append(int(word))
        else:
            names = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
            raise InputError(
                f"class {word} is not one of the checkpoint's {len(classes)} ({names}); give a name or number"
            )
    return chosen


def _prompts(wanted: Sequence[str], model: ImageModel) -> list[str]:
    """The captions to draw images for."""
    if wanted and model.text is None:
        raise InputError(
            "prompts= needs a denoiser of text, and this one was trained with classes only; use classes=, or train "
            "with model.condition_on=text"
        )
    out: list[str] = []
    for word in wanted:
        if not isinstance(word, str):  # YAML reads `flag: japan` as a mapping
            raise InputError(
                f"prompt {word} is not text; put a caption with a colon in quotes, or all into a .txt file"
            )
        if not word.endswith(".txt"):
            out.append(word)
            continue
        try:
            out += local_path(word, "prompts").read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            sentence = f"prompts file {word} can't be read ({error}); give a text file, one a line"
            raise by_reason(sentence, error) from None
    return out


def _output(config: SampleJob, loaded: Loaded, world: World) -> Path:
    """The output path, checked to be free before any image is made."""
    suffix = {"grid": ".png", "folder": "", "npz": ".npz"}[config.format]
    default = results_of(loaded.path) / "samples" / f"{config.format}-{loaded.samples_seen:012d}{suffix}"
    output = Path(config.output) if config.output else default
    if config.format == "folder" and broadcast(output.exists()):
        raise InputError(f"output {output} exists; remove it, or give another output=")
    if config.format != "folder" and output.is_dir():
        raise InputError(f"output {output} is a directory, but format={config.format} writes a file; give its name")
    if why := broadcast(unwritable(output.parent) if world.rank == 0 else ""):
        raise InputError(f"{output.parent} can't be written ({why}); give a place of your own as output=")
    return output
