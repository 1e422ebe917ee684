"""The odd rank out is named, on all ranks, before anything hangs."""

import shutil
from pathlib import Path

import pytest
import torch

from ldt.dist import World, all_gather
from ldt.errors import InputError, RunError
from ldt.run import preflight
from ldt.run.preflight import check_room, check_shared, compare_ranks, differences
from ldt.training.setup import describe_idle

SAME = {"host": "n", "ldt": "1", "torch": "2", "device": "cpu", "config": "c", "clock": 1000.0}


def refused(check) -> str:
    try:
        check()
    except InputError as error:
        return str(error)
    return ""


def compare_case(world: World, what: str) -> list[str]:
    """Rank 1 has something of its own; what each rank is told."""
    config, version = "seed: 1", preflight.__version__
    if world.rank == 1 and what == "config":
        config = "seed: 2"
    if world.rank == 1 and what == "version":
        preflight.__version__ = "0.0.9"
    told = refused(lambda: compare_ranks(config, world))
    preflight.__version__ = version
    return all_gather(told)


def shared_case(world: World, directory: str) -> list[str]:
    """Rank 1's run_dir is a directory of its own."""
    mine = Path(directory) / (str(world.rank) if world.rank == 1 else "shared")
    mine.mkdir(exist_ok=True)
    return all_gather(refused(lambda: check_shared(mine, world, seconds=1.0)))


@pytest.mark.parametrize(("what", "message"), [("config", "has config"), ("version", "has ldt 0.0.9, the others")])
def test_one_rank_differs(pool, what, message):
    told = pool(3).run(compare_case, what=what)
    assert len(set(told)) == 1 and "rank 1 on" in told[0] and message in told[0]


def test_ranks_that_agree_pass(pool):
    assert pool(3).run(compare_case, what="nothing") == [""] * 3


def test_a_directory_that_is_not_shared(pool, tmp_path):
    told = pool(2).run(shared_case, directory=str(tmp_path))
    assert "is not shared" in told[0] and "file system that all nodes share" in told[1]
    assert not list((tmp_path / "shared").iterdir()), "nothing is left there"


def test_what_is_said():
    assert differences([SAME, SAME, SAME | {"clock": 1030.0}]) == []
    (text,) = differences([SAME, SAME | {"torch": "3", "host": "m"}, SAME, SAME])
    assert text == "rank 1 on m has torch 3, the others 2; make them the same"
    (text,) = differences([SAME, SAME, *(SAME | {"device": "gpu"} for _ in range(3))])
    assert text == "rank 0 on n and 1 more ranks has device cpu, the others gpu; make them the same"
    (text,) = differences([SAME, SAME, SAME | {"clock": 880.0, "host": "late"}])
    assert text == "the clock of rank 2 on late is -120 s off; synchronise it"


def test_a_disk_without_room(tmp_path):
    world = World(0, 1, 0, 1, None)
    check_room(tmp_path, 1000, 5, world)
    too_many = shutil.disk_usage(tmp_path).free // 4
    with pytest.raises(RunError, match=r"\d [kMG]?B free, but a checkpoint takes [\d.]+ [kMG]?B; make room"):
        check_room(tmp_path, too_many, 5, world)


def test_what_stands_idle_is_said(monkeypatch):
    """A forgotten launcher on a machine of 8 GPUs, and more processes than samples; else nothing."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    alone, all_of_them = (World(0, n, 0, n, torch.device("cuda", 0)) for n in (1, 8))
    (line,) = describe_idle(alone, 256)
    assert "1 of this machine's 8 GPUs is used; torchrun --nproc_per_node 8" in line
    assert list(describe_idle(all_of_them, 8)) == []
    assert list(describe_idle(all_of_them, 6)) == ["2 of 8 processes have nothing to do: train.global_batch=6"]
    assert list(describe_idle(World(0, 1, 0, 1, torch.device("cpu")), 8)) == []


@pytest.mark.parametrize(
    ("bound_to", "cores", "ranks", "said"),
    [(1, 64, 8, True), (2, 64, 8, True), (8, 64, 8, False), (64, 64, 8, False), (1, 8, 8, False), (1, 2, 1, True)],
)
def test_a_process_bound_to_fewer_cores_than_it_has_threads(monkeypatch, bound_to, cores, ranks, said):
    """srun binds a task to one core unless told otherwise; where there are no more cores than ranks, that is right."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(bound_to)))
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    lines = list(describe_idle(World(0, ranks, 0, ranks, torch.device("cpu")), 256, threads=3))
    assert [f"may use {bound_to} of this machine's {cores} cores" in line for line in lines] == [True] * said


@pytest.mark.parametrize("script", ["train", "encode", "evaluate"])
def test_no_job_script_lets_srun_bind_a_task_to_one_core(script):
    source = (Path(__file__).parents[1] / "slurm" / f"{script}.sh").read_text()
    (line,) = [x for x in source.splitlines() if "$LDT_RUN" in x and "srun " in x]
    assert '"--cpu-bind=$CPU_BIND"' in line
