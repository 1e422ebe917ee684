"""Pools of real processes for distributed tests: started once a world size, many cases inside.

A case is a module-level function `case(world, **arguments)` of a test module; every rank calls it and rank 0's return
value (JSON) comes back. A case that fails on any rank raises here with that rank's traceback and ends the pool.
"""

import importlib
import json
import os
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import forked

from ldt.dist import free_port

TIMEOUT = 180


class CaseFailed(AssertionError):
    """A case raised on some rank."""


class Pool:
    """`size` processes joined in a gloo group, waiting for cases."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, case: Any, **arguments: Any) -> Any:
        """Call `case(world, **arguments)` on all ranks; returns rank 0's result."""
        if not self.workers:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send_bytes(json.dumps([case.__module__, case.__name__, arguments]).encode())
            return self._answers()[0]
        except BaseException:
            self.close()
            raise

    def _answers(self) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        end = time.monotonic() + TIMEOUT
        while missing := sorted(set(range(self.size)) - set(answers)):
            ready = wait([self._pipes[rank] for rank in missing], end - time.monotonic())
            if not ready:
                raise CaseFailed(f"no answer from ranks {missing} of {self.size} within {TIMEOUT} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                try:
                    answer = json.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self.workers[rank].join()
                    answer = {"error": f"the process ended with code {self.workers[rank].exitcode}"}
                if "error" in answer:
                    raise CaseFailed(f"rank {rank} of {self.size}:\n{answer['error']}")
                answers[rank] = answer["result"]
        return answers

    def _start(self) -> None:
        world = {"WORLD_SIZE": str(self.size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(self.size):
            ours, theirs = forked.CONTEXT.Pipe()
            env = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.workers.append(forked.start(serve, theirs, env=env))
            self._pipes.append(ours)
            theirs.close()

    def close(self) -> None:
        for worker, pipe in zip(self.workers, self._pipes, strict=True):
            worker.kill()
            worker.join()
            pipe.close()
        self.workers, self._pipes = [], []


def serve(pipe: Connection) -> None:
    """One rank: carry out cases until nobody asks any more."""
    from ldt.dist import process_group

    warnings.simplefilter("error")
    with process_group() as world:
        while True:
            try:
                module, function, arguments = json.loads(pipe.recv_bytes())
            except EOFError:
                return
            try:
                result = getattr(importlib.import_module(module), function)(world, **arguments)
                answer = {"result": result if world.rank == 0 else None}
            except Exception:
                answer = {"error": traceback.format_exc()}
            pipe.send_bytes(json.dumps(answer).encode())
