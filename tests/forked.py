"""Processes of their own without the seconds that importing torch and DeepSpeed takes.

They are forked from one server a session, which has imported both and has neither threads nor a process group. For
tests of what a process says or leaves behind; those of launchers, start-up and imports start a real interpreter.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from capabilities import drop_overrides

from ldt.dist import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "deepspeed", "torch._dynamo", "ldt.cli", "ldt.commands.train", "compiled_draws"]
)


class Forked:
    """`python WORDS`, started; WORDS begin with `-m ldt` or with `-c CODE`."""

    def __init__(
        self,
        *words: object,
        env: Mapping[str, str] = os.environ,
        cwd: Path | None = None,
        unprivileged: bool = False,
    ) -> None:
        self.args = [str(word) for word in words]
        self._directory = tempfile.TemporaryDirectory()
        self._said = [Path(self._directory.name) / name for name in ("stdout", "stderr")]
        keys = {"words": self.args, "env": dict(env), "cwd": cwd or Path.cwd(), "unprivileged": unprivileged}
        self._process = CONTEXT.Process(target=_carry_out, kwargs=keys | {"said": self._said})
        with _without_packages_of_tests():
            self._process.start()

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end; its exit code and everything that it said."""
        self._process.join(timeout)
        late = self._process.is_alive()
        if late:
            self._process.kill()
            self._process.join()
        code = self._process.exitcode
        self._process.close()
        out, err = [path.read_text() for path in self._said]
        self._directory.cleanup()
        if late:
            raise subprocess.TimeoutExpired(self.args, timeout, out, err)
        return subprocess.CompletedProcess(self.args, code, out, err)


def run(*words: object, timeout: float = 300, **keys: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *words], capture_output=True, text=True)` does, with the keys of Forked."""
    return Forked(*words, **keys).finish(timeout)


def run_ranks(count: int, *words: object, timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """`python WORDS` on so many ranks of one world."""
    meet = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [Forked(*words, env=os.environ | meet | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)]
    return [rank.finish(timeout) for rank in ranks]


@contextlib.contextmanager
def _without_packages_of_tests() -> Iterator[None]:
    """Without what some tests add to the path, `.venv/peers` and its kin: the server and its children take it over."""
    before = sys.path[:]
    sys.path[:] = [path for path in before if Path(path).parent.name != ".venv"]
    try:
        yield
    finally:
        sys.path[:] = before


def _carry_out(words: list[str], env: dict[str, str], cwd: Path, unprivileged: bool, said: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for stream, destination in zip((sys.stdout, sys.stderr), said, strict=True):
        with destination.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    if unprivileged:
        drop_overrides()
    kind, what, *rest = words
    sys.argv = [what if kind == "-m" else kind, *rest]
    if (kind, what) == ("-m", "ldt"):
        from ldt.cli import main

        raise SystemExit(main())
    assert kind == "-c", f"not made for `python {kind}`"
    exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
