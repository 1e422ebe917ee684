"""How a config dataclass declares what it allows; read by `ldt.config`."""

import dataclasses
from typing import Any

from ldt.errors import InputError


def choice(default: str, *others: str) -> Any:
    """A field that takes one of these strings."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


def path_field(default: str = "", remote: bool = False) -> Any:
    """A field that holds a path, expanded and checked by `ldt.paths`. remote: it may be an fsspec address too."""
    return dataclasses.field(default=default, metadata={"path": remote})


def required_path_field(remote: bool = False) -> Any:
    """A `path_field` that every config must set (OmegaConf's mark for a missing value)."""
    return path_field("???", remote)


def path_list_field() -> Any:
    """A field that holds any number of local paths."""
    return dataclasses.field(default_factory=list, metadata={"path": False})


def check_seed(seed: int) -> None:
    """`InputError` for what can't be a key of `ldt.rng`."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed} must be a whole number from 0 to 2**63 - 1")


def section(schema: type) -> Any:
    """A field that holds another schema, by default with its defaults."""
    return dataclasses.field(default_factory=schema)
