"""What a run is, in words and numbers for people."""

import math
from datetime import UTC, datetime

from ldt.config import flatten
from ldt.progress import si_format
from ldt.reporting.history import History, Record, number


def count(value: float) -> str:
    """A whole number with separators."""
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def score(value: float) -> str:
    """One decimal from 100 on, so that the scores of a table are alike; else four significant digits."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def date(seconds: float) -> str:
    """A time stamp in UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return "–"


def duration(hours: float) -> str:
    """A duration in the unit that reads best."""
    if not math.isfinite(hours):
        return "–"
    seconds = hours * 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{hours:.1f} h"


def parameters(run: History) -> int:
    """Trainable numbers of the model, from the newest checkpoint; 0 without one."""
    shapes = run.checkpoint.manifest.get("parameters", {}) if run.checkpoint else {}
    return sum(math.prod(shape) for shape in shapes.values())


def model_words(run: History) -> str:
    """One sentence about the denoiser and how it was trained."""
    model, objective = section(run, "model"), section(run, "objective")
    if not model:
        return "A run whose config could not be read."
    size = parameters(run)
    words = f"A {si_format(size)}-parameter {model.get('name', 'model')}" if size else f"A {model.get('name', 'model')}"
    shape = _unet_shape(model) if model.get("name") == "unet" else _transformer_shape(model)
    words += f" ({', '.join(shape)})" if shape else ""
    return f"{words}, predicting {objective['prediction']}." if "prediction" in objective else f"{words}."


def _transformer_shape(model: Record) -> list[str]:
    shape = [f"{model[k]} {w}" for k, w in (("width", "wide"), ("depth", "deep")) if k in model]
    if "patch" in model:
        shape.append(f"patch {model['patch']}")
    if "conditioning" in model:
        shape.append(f"{str(model['conditioning']).replace('_', '-')} conditioning")
    return shape


def _unet_shape(model: Record) -> list[str]:
    """The UNet's shape from its own keys; the Transformer's are in every config too and do not apply."""
    unet = model.get("unet")
    names = {"channels": "channels", "multipliers": "multipliers", "blocks": "blocks a level"}
    return [f"{name} {unet[key]}" for key, name in names.items() if key in unet] if isinstance(unet, dict) else []


def data_words(run: History) -> str:
    """One sentence about the data."""
    data = section(run, "data")
    path = data.get("path") or " and ".join(str(s) for k, s in flatten(data).items() if k.endswith(".path")) or "?"
    if not run.checkpoint:
        return f"Data: {path}."
    spec = run.checkpoint.manifest.get("sampling", {})
    shape = "×".join(map(str, spec.get("latent_shape", [])))
    side, classes = spec.get("image_size"), len(spec.get("classes", []))
    kind = "grey" if spec.get("image_channels") == 1 else "colour"
    noun = "class" if classes == 1 else "classes"
    if buckets := spec.get("buckets"):
        names = f"{len(buckets)} buckets ({', '.join(sorted(buckets))})"
        return f"Data: {path}, {kind} images in {classes} {noun} and {names}, as latents up to {shape}."
    return f"Data: {path}, {kind} images of {side} pixels in {classes} {noun} as {shape} latents."


def outcome_words(run: History) -> str:
    """One sentence about how far the run got, on how many processes, and when."""
    worlds = list(dict.fromkeys(str(line["world_size"]) for line in run.lines if "world_size" in line))
    total = section(run, "train").get("total_samples")
    words = f"{count(run.samples_seen)}" + (f" of {count(total)}" if isinstance(total, (int, float)) else "")
    words += " samples seen"
    if worlds:
        noun = "process" if worlds == ["1"] else "processes"
        words += f" on {', then '.join(worlds)} {noun}"
    when = number(run.outcome, "time")
    return f"{words}, {date(when)}." if math.isfinite(when) else f"{words}."


def section(run: History, name: str) -> Record:
    """A section of the config; empty where it is missing or damaged."""
    value = run.config.get(name)
    return value if isinstance(value, dict) else {}
