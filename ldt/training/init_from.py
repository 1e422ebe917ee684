"""The weights that a run starts from, taken from another model: fine-tuning.

A parameter fits where it means the same in both models: rows of the class table go by the classes' names, positions by
their tokens, all else by name and shape. What does not fit is named, and made anew only where `train.init_fresh` says
so: it then keeps the value that a run without `train.init_from` would begin with, which depends on the seed alone.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldt import log
from ldt.checkpoint.checkpoint import resolve
from ldt.checkpoint.load import read_exported, read_weights
from ldt.checkpoint.manifest import MODEL, read_spec
from ldt.config import flatten, from_dict, to_dict
from ldt.data.latent_spec import LatentSpec
from ldt.diffusion.config import ObjectiveConfig
from ldt.engine.ema import ShardedEMA
from ldt.engine.partition import Partition
from ldt.errors import InputError
from ldt.nn.align import PREFIX
from ldt.nn.config import ModelConfig
from ldt.progress import pluralize, si_format
from ldt.training.config import TrainJob

logger = log.get_logger(__name__)

MOST_NAMES = 8  # in a sentence
LABELS = "label.weight"
POSITIONS = ("position", "head.position")
NO_MEANING = ("attention", "activation_checkpointing", "init")  # keys of the model that leave its function as it is


class Side(NamedTuple):
    """One of the two models: its config and the facts of its data."""

    model: ModelConfig
    spec: LatentSpec

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image's tokens."""
        return self.spec.latent_shape[1] // self.model.patch, self.spec.latent_shape[2] // self.model.patch

    def tokens_before(self, name: str) -> list[str]:
        """What stands before the image's tokens in a table of positions."""
        if self.model.conditioning != "in_context" or name != "position":
            return []
        text = self.spec.text_shape if self.model.uses_text else None
        return ["time", *["class"] * self.model.uses_class, *(f"text {i}" for i in range(text.length if text else 0))]


@dataclass
class Source:
    """A trained model: where it is, its averaged weights in their shapes, and what they were trained for."""

    path: Path
    weights: dict[str, Tensor]
    side: Side
    objective: ObjectiveConfig
    samples_seen: int

    @classmethod
    def read(cls, path: Path) -> "Source":
        """The newest checkpoint of a run, a checkpoint, or an exported or imported model."""
        if (path / MODEL).exists():
            weights, facts, _ = read_exported(path)
        else:
            path = resolve(path)
            weights, facts, _ = read_weights(path, "ema")
        config = facts["config"]
        side = Side(from_dict(ModelConfig, config["model"], str(path)), read_spec(facts["sampling"]))
        objective = from_dict(ObjectiveConfig, config["objective"], str(path))
        return cls(path, weights, side, objective, facts["samples_seen"])


class Taken(NamedTuple):
    """Values of a parameter, and where they are to be taken: a mask of the same shape, None for everywhere."""

    value: Tensor
    mask: Tensor | None = None


@dataclass
class Start:
    """What of a source goes into a model: values by parameter, and lines that say so."""

    taken: dict[str, Taken] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def start_from(path: Path, config: TrainJob, spec: LatentSpec, partition: Partition, ema: ShardedEMA) -> None:
    """Weights and averages ← what fits of another model's averaged weights (collective).

    The optimizer starts anew, and so does the projector of an alignment.
    """
    source = Source.read(path)
    fresh, resized = config.train.init_fresh, config.train.init_resize
    shapes = {name: shape for name, shape in partition.shapes().items() if not name.startswith(PREFIX)}
    start = fit(source, Side(config.model, spec), shapes, fresh, resized)
    for f in partition.load_targets():
        if f.name in start.taken:
            value, mask = (None if t is None else t.flatten()[f.start : f.start + f.count] for t in start.taken[f.name])
            assert value is not None
            value = value.to(f.master.device)
            f.master.copy_(value if mask is None else torch.where(mask.to(f.master.device), value, f.master))
    ema.reset()
    partition.sync_model_weights()
    for line in start.lines:
        logger.info("%s", line)
    for line in describe_differences(source, config, spec):
        logger.warning("%s", line)


def fit(
    source: Source, ours: Side, shapes: dict[str, tuple[int, ...]], fresh: Sequence[str], resized: Sequence[str]
) -> Start:
    """Decide about every parameter of both models; `InputError` names all that do not fit and are not provided for.

    shapes: of this model's parameters; fresh, resized: names of parameters, or of modules for all that is in them.
    """
    _check_names([*shapes, *source.weights], fresh, resized)
    start, misfits = Start(), {}
    anew, left_out = [], [name for name in source.weights if name not in shapes and _named(name, fresh)]
    for name in [*shapes, *(n for n in source.weights if n not in shapes and n not in left_out)]:
        if _named(name, fresh):
            anew.append(name)
        elif reason := misfit(name, source, ours, shapes):
            if not _named(name, resized) or name not in source.weights or name not in shapes:
                misfits[name] = reason
                continue
            start.taken[name] = _resize(name, source, ours, shapes[name], start.lines)
        elif name == LABELS:
            start.taken[name] = Taken(_rows_by_class(source, ours, start.lines))
        else:
            start.taken[name] = Taken(source.weights[name])
    if misfits:
        raise InputError(_refusal(source, misfits, shapes))
    whole = [name for name, taken in start.taken.items() if taken.mask is None]
    numbers = si_format(sum(math.prod(shapes[name]) for name in whole))
    begin = f"train.init_from={source.path} ({source.samples_seen:,} samples)"
    start.lines.insert(0, f"{begin}: {pluralize(len(whole), 'parameter', 'parameters')} taken, {numbers} numbers")
    if anew:
        start.lines.append(f"made anew, as train.init_fresh says: {_listed(anew)}")
    if left_out:
        start.lines.append(f"left out, as train.init_fresh says: {_listed(left_out)}")
    if ours.model.positions == source.side.model.positions != "learned" and ours.grid != source.side.grid:
        there, here = ("×".join(map(str, side.grid)) for side in (source.side, ours))
        start.lines.append(f"fixed positions ({ours.model.positions}) made for {here} tokens instead of {there}")
    return start


def misfit(name: str, source: Source, ours: Side, shapes: dict[str, tuple[int, ...]]) -> str:
    """Why a parameter can't be taken as it is; empty where it can."""
    theirs = source.side
    if name not in source.weights:
        return "is not there"
    if name not in shapes:
        return "is only there"
    there, here = tuple(source.weights[name].shape), tuple(shapes[name])
    if name == LABELS and there[1:] == here[1:]:
        unknown = _unknown_classes(theirs.spec.classes, ours.spec.classes)
        return f"knows no class {_listed(unknown)}" if unknown else ""
    if name in POSITIONS and there[1:] == here[1:]:
        if theirs.grid != ours.grid:
            return "is for {}×{} tokens there, {}×{} here".format(*theirs.grid, *ours.grid)
        if theirs.tokens_before(name) != ours.tokens_before(name):
            before = [len(side.tokens_before(name)) for side in (theirs, ours)]
            return f"has {before[0]} tokens before the image's there, {before[1]} here"
    if there != here:
        return f"has the shape {list(there)} there, {list(here)} here"
    patches = [(side.spec.latent_shape[0], side.model.patch) for side in (theirs, ours)]
    if "patchify" in name and patches[0] != patches[1]:
        return "has patches of {0[0]}×{0[1]}×{0[1]} numbers there, {1[0]}×{1[1]}×{1[1]} here".format(*patches)
    return ""


def _unknown_classes(theirs: list[str], ours: list[str]) -> list[str]:
    """Which of our classes have no row of their own there."""
    return [] if _by_number(theirs, ours) else [name for name in ours if name not in set(theirs)]


def _by_number(theirs: list[str], ours: list[str]) -> bool:
    """Whether classes are matched by number: as many, and on one side they have only numbers for names."""
    unnamed = [str(i) for i in range(len(ours))]
    return len(theirs) == len(ours) and unnamed in (theirs, ours)


def _rows_by_class(source: Source, ours: Side, lines: list[str]) -> Tensor:
    """The class table with a row for each of our classes, the null label's last."""
    theirs, classes, table = source.side.spec.classes, ours.spec.classes, source.weights[LABELS]
    if theirs == classes:
        return table
    if _by_number(theirs, classes):
        lines.append(f"{LABELS}: {len(classes)} classes by their numbers, as one side has no names for them")
        return table
    rest = len(theirs) - len(classes)
    lines.append(f"{LABELS}: rows of {len(classes)} classes by their names, {rest} classes left out")
    return table[[*map(theirs.index, classes), -1]]


def _resize(name: str, source: Source, ours: Side, shape: tuple[int, ...], lines: list[str]) -> Taken:
    if name == LABELS:
        return _known_rows(source, ours, shape, lines)
    return _resized_positions(name, source, ours, shape, lines)


def _known_rows(source: Source, ours: Side, shape: tuple[int, ...], lines: list[str]) -> Taken:
    """The rows of the classes that both know and that of the null label; those of the others stay as they are."""
    theirs, value, mask = source.side.spec.classes, torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    known = [(i, theirs.index(c)) for i, c in enumerate(ours.spec.classes) if c in theirs]
    for here, there in [*known, (-1, -1)]:
        value[here], mask[here] = source.weights[LABELS][there], True
    new = len(ours.spec.classes) - len(known)
    lines.append(f"{LABELS}: rows of {len(known)} classes by their names, {new} made anew, as train.init_resize says")
    return Taken(value, mask)


def _resized_positions(name: str, source: Source, ours: Side, shape: tuple[int, ...], lines: list[str]) -> Taken:
    """Learned positions: the image's bicubic on the new grid, those of other tokens as they are or made anew."""
    theirs, table_ND = source.side, source.weights[name]
    before, here = theirs.tokens_before(name), ours.tokens_before(name)
    grid = rearrange(table_ND[len(before) :], "(r c) d -> 1 d r c", r=theirs.grid[0])
    if theirs.grid != ours.grid:
        grid = F.interpolate(grid, ours.grid, mode="bicubic", align_corners=False)
    value, mask = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    value[len(here) :] = rearrange(grid, "1 d r c -> (r c) d")
    for row, token in enumerate(here):
        if token in before:
            value[row] = table_ND[before.index(token)]
        else:
            mask[row] = False
    new = sum(token not in before for token in here)
    change = "{}×{} to {}×{} tokens".format(*theirs.grid, *ours.grid)
    anew = f", those of {pluralize(new, 'token', 'tokens')} before them made anew" if new else ""
    lines.append(f"{name}: resized from {change}{anew}, as train.init_resize says")
    return Taken(value, mask)


def describe_differences(source: Source, config: TrainJob, spec: LatentSpec) -> Iterator[str]:
    """A line for each thing in which the weights were trained for something else, and which no parameter shows."""
    was = "the weights of train.init_from were trained"
    for section, before, now in (
        ("objective", source.objective, config.objective),
        ("model", source.side.model, config.model),
    ):
        there, here = flatten(to_dict(before)), flatten(to_dict(now))
        for key in (k for k in here if there[k] != here[k] and _means_something(section, k, now)):
            yield f"{was} with {section}.{key}={there[key]}, and go on here with {here[key]}"
    theirs = source.side.spec
    if theirs.autoencoder_hash != spec.autoencoder_hash:
        yield (
            f"{was} on latents of autoencoder {theirs.autoencoder}, and go on here with those of {spec.autoencoder}; "
            "train.init_fresh=[patchify,unpatchify] would make the layers anew that read and write them"
        )
    if config.model.uses_text and source.side.model.uses_text and theirs.text.get("hash") != spec.text.get("hash"):
        yield (
            f"{was} with captions of text encoder {theirs.text['encoder']}, and go on here with {spec.text['encoder']}"
        )


def _means_something(section: str, key: str, config: object) -> bool:
    """Whether a key that differs changes what the model computes."""
    if section != "model" or not isinstance(config, ModelConfig):
        return True
    if key.startswith(("unet.", "head.")):
        return config.name == "unet" if key.startswith("unet.") else config.head.depth > 0
    return key not in NO_MEANING and key != "condition_on"


def _named(name: str, entries: Sequence[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in entries)


def _check_names(names: Sequence[str], fresh: Sequence[str], resized: Sequence[str]) -> None:
    """Refuse entries that name nothing, and what can't be resized."""
    for entry in fresh:
        if not any(_named(name, [entry]) for name in names):
            modules = {".".join(parts[:i]) for n in names for parts in [n.split(".")] for i in range(1, len(parts) + 1)}
            near = difflib.get_close_matches(entry, sorted(modules), n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {_listed(sorted(names))}"
            raise InputError(f"train.init_fresh names {entry}, which neither model has; {hint}")
    for entry in resized:
        if entry not in (LABELS, *POSITIONS) or entry not in names:
            there = [name for name in (LABELS, *POSITIONS) if name in names]
            raise InputError(
                f"train.init_resize={entry} can't be resized; these can: {', '.join(there) or 'none of this model'}"
            )


def _refusal(source: Source, misfits: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> str:
    shown = [f"{name} {reason}" for name, reason in list(misfits.items())[:MOST_NAMES]]
    more = f" and {len(misfits) - MOST_NAMES:,} more" if len(misfits) > MOST_NAMES else ""
    resizable = [n for n in (LABELS, *POSITIONS) if n in misfits and n in shapes and n in source.weights]
    resize = f", train.init_resize=[{','.join(resizable)}] takes what it can of these" if resizable else ""
    modules = _modules(list(misfits), [*shapes, *source.weights])
    return (
        f"train.init_from={source.path} holds another model: {'; '.join(shown)}{more}; set model.* as there, or "
        f"train.init_fresh=[{','.join(modules)}] does without them{resize}"
    )


def _modules(names: list[str], among: Sequence[str]) -> list[str]:
    """The names, in one word where all of a module are meant; the first few."""
    out: dict[str, None] = {}
    for name in names:
        module = name.partition(".")[0]
        whole = all(n in names for n in among if n.startswith(f"{module}."))
        out[module if whole else name] = None
    return [*out][:MOST_NAMES] + ["…"] * (len(out) > MOST_NAMES)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
