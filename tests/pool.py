"""Pools of real processes for distributed tests: started once a world size, many cases inside.

A case is a module-level function `case(world, **arguments)` of a test module; every rank calls it and rank 0's return
value (JSON) comes back. A case that fails on any rank raises here with that rank's traceback and ends the pool.

Run as a program this file is one rank of a pool.
"""

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from ldt.dist import free_port

HERE = Path(__file__).parent
TIMEOUT = 180


class CaseFailed(AssertionError):
    """A case raised on some rank."""


class Pool:
    """`size` processes joined in a gloo group, waiting for cases."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[subprocess.Popen[str]] = []
        self.results: queue.Queue[dict[str, Any]] = queue.Queue()

    def run(self, case: Any, **arguments: Any) -> Any:
        """Call `case(world, **arguments)` on all ranks; returns rank 0's result."""
        if not self.workers:
            self._start()
        order = {"module": case.__module__, "function": case.__name__, "arguments": arguments}
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(order) + "\n")
            worker.stdin.flush()
        answers: dict[int, Any] = {}
        try:
            while len(answers) < self.size:
                answer = self.results.get(timeout=TIMEOUT)
                if "error" in answer:
                    raise CaseFailed(f"rank {answer['rank']} of {self.size}:\n{answer['error']}")
                answers[answer["rank"]] = answer["result"]
        except (CaseFailed, queue.Empty) as error:
            self.close()
            if isinstance(error, queue.Empty):
                missing = sorted(set(range(self.size)) - set(answers))
                raise CaseFailed(f"no answer from ranks {missing} of {self.size} within {TIMEOUT} s") from None
            raise
        return answers[0]

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.size):
            env = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{HERE.parent}:{HERE}:{HERE.parent / 'tools'}",
            }
            command = [sys.executable, "-W", "error", __file__]
            worker = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.workers.append(worker)
            threading.Thread(target=self._listen, args=(rank, worker), daemon=True).start()

    def _listen(self, rank: int, worker: "subprocess.Popen[str]") -> None:
        assert worker.stdout is not None
        with worker.stdout:
            for line in worker.stdout:
                if line.startswith("{"):
                    self.results.put(json.loads(line))
        self.results.put({"rank": rank, "error": f"the process ended with code {worker.wait()}"})

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
        self.workers = []
        self.results = queue.Queue()


def serve() -> None:
    """One rank: read cases from stdin until it ends."""
    from ldt.dist import process_group

    with process_group() as world:
        for line in sys.stdin:
            order = json.loads(line)
            answer: dict[str, Any] = {"rank": world.rank}
            try:
                function = getattr(importlib.import_module(order["module"]), order["function"])
                answer["result"] = function(world, **order["arguments"])
            except Exception:
                answer["error"] = traceback.format_exc()
            print(json.dumps(answer if world.rank == 0 or "error" in answer else answer | {"result": None}), flush=True)


if __name__ == "__main__":
    serve()
