"""ldt: distributed training of latent diffusion Transformers.

For programs and notebooks there is `ldt.load` (docs/api.md); everything else is a command.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["InputError", "Model", "RunError", "__version__", "load"]

_HOMES = {"load": "ldt.api", "Model": "ldt.api", "InputError": "ldt.errors", "RunError": "ldt.errors"}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first asked for: torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ldt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
