"""Run by every interpreter that tests start, as conftest.py puts it on their path: numba keeps what it compiles.

The draws and the digest take each `ldt train` 2 CPU seconds to compile, always from the same code. What comes of it
is kept in NUMBA_CACHE_DIR, which is new for each session: an old one would not see that another module's constants have
changed.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any


class KeepCompiled:
    """A finder that makes `cache=True` the default of numba's `jit` when numba is imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "numba.core.decorators":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def with_cache(module: Any) -> None:
            execute(module)
            jit = module.jit
            module.jit = lambda *arguments, **keys: jit(*arguments, **{"cache": True} | keys)

        spec.loader.exec_module = with_cache  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, KeepCompiled())  # type: ignore[arg-type]
