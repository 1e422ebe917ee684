"""How a tool ends: with an exit code, and with one sentence about what went wrong, as `ldt` itself does."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ldt.errors import InputError, RunError, file_error, in_a_sentence


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool and leave with its exit code: 2 where its input is wrong, 1 where something else went wrong."""
    name = Path(sys.argv[0]).stem
    try:
        sys.exit(_exit_code(main))
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"{name}: failed: {error}", file=sys.stderr)
        sys.exit(1)


def _exit_code(main: Callable[[], int | None]) -> int:
    """The exit code; expected failures are `InputError` or `RunError`."""
    try:
        with in_a_sentence():
            return main() or 0
    except OSError as error:
        if not error.filename:
            raise
        raise file_error(str(error.filename), error, "give another path") from None
    except subprocess.CalledProcessError as error:
        words = " ".join(map(str, error.cmd))
        raise RunError(f"{words} ended with {error.returncode}; it has said why") from None
