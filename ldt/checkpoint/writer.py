"""Saving in the background: training pauses only for a copy to host memory, and threads do the rest.

Every rank writes and syncs its file under a temporary name; when all have, rank 0 adds the manifest and renames, which
commits. How far each rank is travels with the sums that the training step makes anyway (`vote`, `settle`), so no rank
waits for another's disk, and a failure anywhere ends that save everywhere one step later: the older checkpoints stay,
and the run goes on.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from torch import Tensor

from ldt import rng
from ldt.checkpoint.manifest import FORMAT, MANIFEST, MANIFEST_HASH, VERSION, versions
from ldt.checkpoint.retention import Retention, delete, remove, remove_old
from ldt.checkpoint.tensors import write_safetensors
from ldt.cluster.gpus import use_device
from ldt.dist import World, all_reduce_sum
from ldt.engine.partition import MOMENTS, Partition
from ldt.errors import RunError
from ldt.files import sync_directory, write_synced
from ldt.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Content:
    """What goes into `root/<samples_seen>`: for each kind one tensor per owned fragment, None where there is none.

    Without retention all stay.
    """

    root: Path
    kinds: Mapping[str, Sequence[Tensor | None]]
    retention: Retention | None = None

    def final(self, samples_seen: int) -> Path:
        return self.root / f"{samples_seen:012d}"

    def temporary(self, samples_seen: int) -> Path:
        return self.root / f".{samples_seen:012d}.tmp"


@dataclass
class _Save:
    """One save on its way: first every rank writes, then rank 0 commits; `future` is this rank's part, if any."""

    samples_seen: int
    contents: list[Content]
    facts: dict[str, Any]
    future: Future[None] | None
    committing: bool = False


class Writer:
    """Saves one state after another. `check` is called before each commit and raises if it must not happen."""

    def __init__(self, partition: Partition, world: World, check: Callable[[], None] = lambda: None) -> None:
        self._partition, self._world, self._check = partition, world, check
        self._pool = ThreadPoolExecutor(1, "ldt-checkpoint", initializer=use_device, initargs=(world.device,))
        self._save: _Save | None = None
        self._host: dict[str, Tensor] = {}
        self.problem = ""  # of the newest save that has ended; empty if it is whole
        self.refused = ""  # why `check` did not let rank 0 commit

    def begin(self, contents: list[Content], facts: dict[str, Any]) -> None:
        """Copy the tensors and start to write them (collective); a save that is still on its way is waited for.

        facts: what the manifest says besides its own, or instead; needs `progress`.
        """
        self.finish()
        copies: dict[Path, dict[str, Tensor]] = {}
        for content in contents:
            copies[content.root] = {
                f"{kind}/{f.name}": self._copy(f"{kind}/{f.name}", tensor)
                for kind, tensors in content.kinds.items()
                for f, tensor in zip(self._partition.owned, tensors, strict=True)
                if tensor is not None
            }
        if self._world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        samples_seen = facts["progress"]["samples_seen"]
        future = self._pool.submit(self._write, samples_seen, contents, copies)
        self._save = _Save(samples_seen, contents, self._shared_facts() | facts, future)

    def vote(self) -> tuple[int, int]:
        """This rank's progress with the save, to be summed over ranks: (its part has ended, its part has failed)."""
        future = self._save.future if self._save else None
        if future is None or not future.done():
            return 0, 0
        return 1, int(future.exception() is not None)

    def settle(self, over: int, failed: int) -> None:
        """Advance the save once every rank is ready; all ranks decide alike, from the sums of their votes."""
        save = self._save
        if save is None or over < (1 if save.committing else self._world.size):
            return
        if failed:
            error = save.future.exception() if save.future else None
            why = f" ({error.strerror})" if isinstance(error, OSError) else ""
            self.problem = f"the checkpoint at {save.samples_seen} samples could not be saved on {failed} rank(s){why}"
            self._save = None
            if self._world.rank == 0:
                logger.error("%s; older ones stay, and training goes on", self.problem)
                if not self.refused:  # else another job may be writing under the same name
                    self._pool.submit(_remove_temporary, save)
        elif save.committing:
            self.problem, self._save = "", None
        else:
            save.committing = True
            save.future = self._pool.submit(self._commit, save) if self._world.rank == 0 else None

    def finish(self) -> None:
        """Wait until the save on its way is committed or has failed (collective)."""
        while self._save is not None:
            if self._save.future is not None:
                wait([self._save.future])
            votes = torch.tensor(self.vote(), device=self._world.device)
            self.settle(*all_reduce_sum(votes).tolist())

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        """Copy into host memory, which is reused from save to save."""
        host = self._host.get(key)
        if host is None:
            host = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
            self._host[key] = host
        return host.copy_(tensor.detach(), non_blocking=True)

    def _write(self, samples_seen: int, contents: list[Content], copies: dict[Path, dict[str, Tensor]]) -> None:
        rank, size = self._world.rank, self._world.size
        for content in contents:
            directory = content.temporary(samples_seen)
            path = directory / f"rank-{rank:05d}-of-{size:05d}.safetensors"
            try:
                directory.mkdir(parents=True, exist_ok=True)
                entry = write_safetensors(path, copies[content.root])
                entry["ranges"] = {f.name: [f.start, f.count] for f in self._partition.owned}
                write_synced(path.with_suffix(".json"), json.dumps(entry).encode())
            except OSError as error:
                logger.error("rank %d could not write %s: %s", rank, path, error.strerror)
                raise

    def _shared_facts(self) -> dict[str, Any]:
        partition = self._partition
        software = {"world_size": self._world.size, "zero_stage": partition.stage, "time": time.time(), **versions()}
        return {
            "format": FORMAT,
            "version": VERSION,
            "rng_version": rng.VERSION,
            "optimizer_steps": partition.optimizer_steps(),
            "parameters": {k: list(v) for k, v in partition.shapes().items()},
            "absent": {MOMENTS[1]: sorted(partition.matrices)},
            "written_by": software,
        }

    def _commit(self, save: _Save) -> None:
        """Once all files are there, rank 0 writes the manifest, renames the directory and deletes what is too old."""
        try:
            for content in save.contents:
                temporary, final = content.temporary(save.samples_seen), content.final(save.samples_seen)
                files = {}
                for rank in range(self._world.size):
                    entry = temporary / f"rank-{rank:05d}-of-{self._world.size:05d}.json"
                    files[entry.with_suffix(".safetensors").name] = json.loads(entry.read_text())
                    entry.unlink()
                text = json.dumps({**save.facts, "tensors": list(content.kinds), "files": files}, indent=1).encode()
                write_synced(temporary / MANIFEST_HASH, xxhash.xxh64(text).hexdigest().encode())
                write_synced(temporary / MANIFEST, text)
                sync_directory(temporary)
                self._check()
                if os.path.lexists(final):  # a resumed run comes by here again
                    delete(final)
                temporary.rename(final)
                sync_directory(content.root)
                if content.retention is not None:
                    remove_old(content.root, content.retention)
        except RunError as error:
            self.refused = str(error)
            raise
        except Exception as error:
            logger.error("the checkpoint at %d samples could not be committed: %s", save.samples_seen, error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)  # a failed save may still have to be cleared away


def _remove_temporary(save: _Save) -> None:
    for content in save.contents:
        if (temporary := content.temporary(save.samples_seen)).exists():
            remove(temporary)
