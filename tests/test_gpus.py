"""Which GPU a rank takes, what CUDA and NCCL are told, and who is refused: with CUDA's answers faked."""

import ast
import contextlib
import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch

from ldt import dist
from ldt.cluster.gpus import Occupant, choose_arithmetic, conflict, occupant, use_device

ROOT = Path(__file__).parents[1]
TASK = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "4",
    "SLURM_NODEID": "0",
}


def show_gpus(monkeypatch, *names):
    """This process sees GPUs of these names."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=names[torch.device(device).index])
    )


@pytest.mark.parametrize(
    ("env", "gpus", "index"),
    [
        ({}, 4, 3),  # every task sees all
        ({"SLURM_GPUS_PER_TASK": "1"}, 1, 0),
        ({"SLURM_GPU_BIND": "single:1"}, 1, 0),
        ({"SLURM_NTASKS_PER_GPU": "1"}, 1, 0),
        ({"CUDA_VISIBLE_DEVICES": "3"}, 1, 0),
    ],
)
def test_every_way_of_showing_gpus_is_understood(monkeypatch, env, gpus, index):
    show_gpus(monkeypatch, *"abcd"[:gpus])
    assert dist.discover(TASK | env) == dist.World(3, 4, 3, 4, torch.device("cuda", index))


def test_local_rank_is_the_ordinal_that_deepspeed_may_set(monkeypatch):
    """It calls set_device(LOCAL_RANK): with one visible GPU that must be 0, whatever the rank on the node."""
    calls = fake_group(monkeypatch, dist.World(3, 4, 3, 4, torch.device("cuda", 0)))
    with dist.process_group():
        assert os.environ["RANK"] == "3" and os.environ["LOCAL_RANK"] == "0"
    calls = fake_group(monkeypatch, dist.World(3, 4, 3, 4, torch.device("cpu")))
    with dist.process_group():
        assert os.environ["LOCAL_RANK"] == "3"
    assert calls["devices"] == []


def fake_group(monkeypatch, world):
    """`process_group` on this world, with torch's calls recorded instead of made."""
    calls = {"devices": [], "groups": []}
    monkeypatch.setattr(dist, "discover", lambda: world)
    monkeypatch.setattr(dist, "_meet", lambda world, seconds: "store")
    monkeypatch.setattr(dist, "_connect", lambda world: None)
    monkeypatch.setattr(torch.cuda, "set_device", calls["devices"].append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **group: calls["groups"].append(group))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    return calls


def test_objects_go_by_gloo_and_tensors_by_nccl(monkeypatch):
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", raising=False)
    calls = fake_group(monkeypatch, dist.World(0, 2, 0, 2, torch.device("cuda", 0)))
    with dist.process_group():
        # torch's own monitor would end the process before engine.stall_seconds, and without our stacks
        assert int(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > 24 * 3600
    (group,) = calls["groups"]
    assert group["backend"] == "cpu:gloo,cuda:nccl" and group["device_id"] == torch.device("cuda", 0)
    assert calls["devices"] == [torch.device("cuda", 0)]
    monkeypatch.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "77")
    with dist.process_group():
        assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "77", "the user's word stays"


def test_a_rank_is_known_by_its_gpu(monkeypatch):
    show_gpus(monkeypatch, "a", "b")
    mine = [occupant(torch.device("cuda", i), {}) for i in (0, 1)]
    assert [o.gpu for o in mine] == ["a", "b"] and not conflict(mine)
    parts = [occupant(torch.device("cuda", 0), {"CUDA_VISIBLE_DEVICES": f"MIG-{i}"}) for i in (0, 1)]
    assert not conflict(parts), "two parts of one GPU are two"
    assert occupant(torch.device("cpu")).gpu == ""


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([("n1", "cpu"), ("n1", "cpu")], ""),
        ([("n1", "cuda", "a"), ("n1", "cuda", "b"), ("n2", "cuda", "a")], ""),
        ([("n1", "cuda", "a"), ("n2", "cpu")], "1 of 2 ranks see no GPU, on n2"),
        ([("n1", "cuda", "a"), ("n1", "cuda", "b"), ("n1", "cuda", "a")], "ranks 0 and 2 on n1 have the same GPU"),
    ],
)
def test_who_cannot_work_together_is_named(ranks, words):
    found = conflict([Occupant(*r) for r in ranks])
    assert found.startswith(words) and bool(found) == bool(words)


MEET = """
import sys, torch
from types import SimpleNamespace
from ldt import dist
from ldt.cluster import gpus
rank = dist.discover().rank
mine = [["n1", "cuda", "a"], ["n1", "cuda", "a"] if sys.argv[1] == "same" else ["n2", "cpu"]][rank]
dist.occupant = lambda device: mine
try:
    with dist.process_group(30):
        print("met")
except dist.InputError as error:
    print(error)
"""


@pytest.mark.parametrize(("case", "words"), [("same", "have the same GPU"), ("kinds", "see no GPU, on n2")])
def test_all_ranks_are_told_before_anything_hangs(case, words):
    told = [rank.stdout for rank in forked.run_ranks(2, "-c", MEET, case)]
    assert told[0] == told[1] and words in told[0]


HANG = """
import time
from ldt import dist
dist.FIRST_COLLECTIVE_TIMEOUT_S = 0.5
dist._connect = lambda world: time.sleep(600)
with dist.process_group():
    pass
"""


def test_a_first_collective_that_hangs_ends_with_a_sentence():
    done = forked.run("-c", HANG, timeout=120)
    assert done.returncode == 1
    assert "the first all-reduce over 1 ranks on cpu has not ended after 0.5 s; look at the network" in done.stderr


# ------------------------------------------------------------------------------------------------------------- threads

HOST_ONLY = {
    "data.images.open": ["THREADS", "THREADS"],
    "data.loader": ["ldt-download"],
    "data.shards.remote": ["ldt-remote"],
    "data.stages": ["threads"],
    "dist": ["Timer"],
    "encoding.look": ["threads"],
    "encoding.encoder": ["self.config.threads", "1"],  # they read images and write shards; the network is the caller's
    "reporting.pictures": ["THREADS"],
    "run.claims": ["self._beat"],
    "run.watchdog": ["self._watch"],
}
"""Threads that touch no tensor on a device."""


def test_every_thread_that_touches_cuda_sets_its_device():
    """A thread begins on GPU 0: a stream, an event or a copy made there would take half a GB of it from rank 0."""
    found = {}
    for path in sorted((ROOT / "ldt").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "ldt").with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("ThreadPoolExecutor", "Thread", "Timer")
            ):
                words = ast.unparse(node)
                if "initializer=use_device" not in words:
                    found.setdefault(module, []).append(words)
    assert found.keys() == HOST_ONLY.keys()
    for module, calls in found.items():
        assert len(calls) == len(HOST_ONLY[module]), calls
        for call, words in zip(calls, HOST_ONLY[module], strict=True):
            assert words in call


def test_a_pools_threads_take_the_device(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    with ThreadPoolExecutor(1, initializer=use_device, initargs=(torch.device("cuda", 2),)) as pool:
        pool.submit(int).result()
    assert taken == [torch.device("cuda", 2)]
    use_device(torch.device("cpu"))
    assert len(taken) == 1


# ---------------------------------------------------------------------------------------------------------- arithmetic


@pytest.fixture
def arithmetic(monkeypatch):
    """Undoes what the test chooses, and says what is chosen."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield lambda: (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_float32_means_what_was_chosen(arithmetic, monkeypatch):
    choose_arithmetic()
    assert arithmetic() == ("highest", False, None, False)
    choose_arithmetic(tf32=True)
    assert arithmetic() == ("high", True, None, False)
    choose_arithmetic(deterministic=True)  # without cuBLAS's setting every matrix product would be refused on CUDA
    assert arithmetic() == ("highest", False, ":4096:8", True)


@pytest.mark.parametrize(
    ("command", "job", "deterministic"),
    [
        ("train", {"run_dir": "x", "engine": SimpleNamespace(deterministic=True)}, True),
        ("encode", {"index": True}, False),
        ("evaluate", {"engine": {"deterministic": True}, "evaluate": None}, True),
        ("sample", {}, False),
    ],
)
def test_every_command_that_computes_chooses_before_cuda_starts(arithmetic, monkeypatch, command, job, deterministic):
    module = importlib.import_module(f"ldt.commands.{command}")
    torch.backends.cudnn.allow_tf32 = True  # as torch has it
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # the job has no more than this
        module.run(SimpleNamespace(**job))
    precision, tf32, workspace, fixed = arithmetic()
    assert (precision, tf32, fixed) == ("highest", False, deterministic)
    assert workspace == (":4096:8" if deterministic else None)
