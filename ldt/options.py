"""How a config dataclass declares what it allows; read by `ldt.config`."""

import dataclasses
from typing import Any


def choice(default: str, *others: str) -> Any:
    """A field that takes one of these strings."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


def required() -> Any:
    """A field that every config must set (OmegaConf's mark for a missing value)."""
    return dataclasses.field(default="???")


def section(schema: type) -> Any:
    """A field that holds another schema, by default with its defaults."""
    return dataclasses.field(default_factory=schema)
