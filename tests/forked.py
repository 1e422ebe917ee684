"""Processes of their own without the seconds that importing torch and DeepSpeed takes.

They are forked from one server a session, which has imported both and has neither threads nor a process group. For
tests of what a process says or leaves behind; those of launchers, start-up and imports start a real interpreter.
"""

import contextlib
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from capabilities import drop_overrides

from ldt.dist import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "deepspeed", "torch._dynamo", "ldt.cli", "ldt.commands.train", "warmed_up"])


class Forked:
    """`python WORDS`, started; WORDS begin with `-m ldt`, with `-c CODE` or with a program's file."""

    def __init__(
        self,
        *words: object,
        env: Mapping[str, str] = os.environ,
        cwd: Path | None = None,
        unprivileged: bool = False,
    ) -> None:
        self.args = [str(word) for word in words]
        directory = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self._said = directory / "stdout", directory / "stderr"
        self._process = start(_carry_out, self.args, self._said, cwd or Path.cwd(), unprivileged, env=env)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """A signal to it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """Wait for its end; its exit code."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end; its exit code and everything that it said. One that is late is killed."""
        try:
            code = self.wait(timeout)
        except subprocess.TimeoutExpired as late:
            late.stdout, late.stderr = self.kill()
            raise
        return subprocess.CompletedProcess(self.args, code, *self.said())

    def kill(self) -> tuple[str, str]:
        """End it, if it still runs; what it had said to stdout and stderr."""
        self._process.kill()
        self._process.join()
        return self.said()

    def said(self) -> tuple[str, str]:
        """What it has written to stdout and stderr by now."""
        out, err = [path.read_text() if path.exists() else "" for path in self._said]
        return out, err


def run(*words: object, timeout: float = 300, **keys: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *words], capture_output=True, text=True)` does, with the keys of Forked."""
    return Forked(*words, **keys).finish(timeout)


def run_ranks(count: int, *words: object, timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """`python WORDS` on so many ranks of one world."""
    return [rank.finish(timeout) for rank in start_ranks(count, *words)]


def start_ranks(count: int, *words: object, **keys: Any) -> list[Forked]:
    """As `run_ranks`, without waiting for their end."""
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    meet = world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Forked(*words, env=os.environ | meet | {"RANK": str(r), "LOCAL_RANK": str(r)}, **keys) for r in range(count)
    ]


def start(target: Callable[..., None], *arguments: Any, env: Mapping[str, str]) -> BaseProcess:
    """A process that calls `target(*arguments)` with this environment."""
    process = CONTEXT.Process(target=_in_environment, args=(dict(env), target, arguments))
    with _without_packages_of_tests():
        process.start()
    return process


@contextlib.contextmanager
def _without_packages_of_tests() -> Iterator[None]:
    """Without what some tests add to the path, `.venv/peers` and its kin: the server and its children take it over."""
    before = sys.path[:]
    sys.path[:] = [path for path in before if Path(path).parent.name != ".venv"]
    try:
        yield
    finally:
        sys.path[:] = before


def _in_environment(env: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(env)
    target(*arguments)


def _carry_out(words: list[str], said: tuple[Path, Path], cwd: Path, unprivileged: bool) -> None:
    os.chdir(cwd)
    for stream, destination in zip((sys.stdout, sys.stderr), said, strict=True):
        with destination.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    if unprivileged:
        drop_overrides()
    kind, *rest = words
    if kind in ("-m", "-c"):
        what, *rest = rest
    sys.argv = [what if kind == "-m" else kind, *rest]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    elif kind != "-m":
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
    else:
        assert what == "ldt", f"not made for `python -m {what}`"
        from ldt.cli import main

        raise SystemExit(main())
