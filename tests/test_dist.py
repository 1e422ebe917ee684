"""Who a process is under each launcher, where the ranks meet, and what is said when they don't."""

import ast
import os
import socket
from pathlib import Path

import forked
import pytest

import ldt
from ldt.cluster.launchers import first_node, master, place
from ldt.dist import discover, free_port, process_group
from ldt.errors import InputError

TASK = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "4",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 4, 1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, (3, 4, 1, 2)),
        (TASK, (4, 5, 0, 1)),
        (TASK | {"SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"}, (1, 5, 1, 2)),
        (TASK | {"SLURM_STEP_ID": "4294967291"}, (0, 1, 0, 1)),  # the batch script itself
        (TASK | {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "0"}, (4, 5, 0, 5)),
        # one torchrun or deepspeed a node, started by srun: they know better
        (TASK | {"RANK": "9", "WORLD_SIZE": "10", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, (9, 10, 1, 10)),
        (TASK | {"RANK": "9", "WORLD_SIZE": "10", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, (9, 10, 1, 2)),
        (
            {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_LOCALID": "1"},
            (1, 2, 1, 2),
        ),
    ],
)
def test_every_launcher_is_understood(env, expected):
    assert tuple(place(env)) == expected
    world = discover(env)
    assert (world.rank, world.size, world.device.type) == (*expected[:2], "cpu")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (TASK | {"RANK": "0", "WORLD_SIZE": "1"}, "say rank 0 of 1, but SLURM says task 4 of 5"),
        ({"RANK": "two", "WORLD_SIZE": "4"}, "RANK='two', which is not a whole number"),
        ({"RANK": "2"}, "WORLD_SIZE=None"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "rank 4 of world size 4"),
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "is not of the form"),
    ],
)
def test_contradictions_name_both_sides(env, message):
    with pytest.raises(InputError, match=message):
        place(env)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("a1,a2", "a1"),
        ("gpu[07-09,12],b1", "gpu07"),
        ("r[1,3]n2", "r1n2"),
        ("x-3-[11]", "x-3-11"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


def test_where_the_ranks_meet():
    assert master({"MASTER_ADDR": "a", "MASTER_PORT": "7"} | TASK) == ("a", 7)
    host, port = master(TASK)
    assert host == "gpu07" and 20000 <= port < 32000
    assert master(TASK | {"SLURM_JOB_ID": "78"})[1] != port != master(TASK | {"SLURM_STEP_ID": "1"})[1]
    assert master({"SUBMITIT_LOCAL_JOB_ID": "5"}) == ("127.0.0.1", 20005)
    with pytest.raises(InputError, match="start them with torchrun"):
        master({})
    deepspeed = {"MASTER_ADDR": "a", "MASTER_PORT": "29500", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}
    assert master(deepspeed) == ("a", 20000 + os.getppid() % 12000), "of its own launcher"
    assert master(deepspeed | {"CROSS_SIZE": "2"}) == ("a", 29500), "other nodes can't know that"
    assert master(deepspeed | {"MASTER_PORT": "7"}) == ("a", 7), "what it was told"


MEET = """
import sys
from ldt.dist import process_group, all_gather
from ldt.errors import RunError
try:
    with process_group(float(sys.argv[1])) as world:
        print(all_gather(world.rank))
except RunError as error:
    print("refused:", error)
"""


def test_ranks_with_hours_of_work_of_their_own_wait_for_each_other():
    """gloo gives up after half an hour, which one rank's part of an evaluation or an encoding may take."""
    for path in (Path(ldt.__file__).parent).rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        for call in (c for c in calls if ast.unparse(c.func) == "process_group"):
            assert "SLOWEST_RANK_TIMEOUT" in ast.unparse(call), f"{path}:{call.lineno}"


def test_ranks_meet():
    assert [rank.stdout for rank in forked.run_ranks(2, "-c", MEET, 30)] == ["[0, 1]\n"] * 2


def test_a_group_leaves_no_trace_in_the_environment(monkeypatch):
    """What a process starts after its group is over (a job, say) must not take itself for one of its ranks."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with process_group():
        assert os.environ["RANK"] == "0"
    assert dict(os.environ) == before


def test_who_is_missing_is_named_in_bounded_time():
    """Rank 1 of 3 never comes; and rank 0 itself."""
    port = free_port()

    def start(rank, size, seconds):
        env = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return forked.Forked("-c", MEET, seconds, env=os.environ | env)

    zero, two = start(0, 3, 10), start(2, 3, 10)
    for rank in (zero, two):
        assert "after 10 s these of 3 ranks had not come: 1" in rank.finish(timeout=60).stdout
    assert "can't reach rank 0 at 127.0.0.1:" in start(1, 2, 3).finish(timeout=60).stdout


def test_a_taken_port_is_named():
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        s.listen()
        port = s.getsockname()[1]
        env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = forked.run("-c", MEET, 3, env=os.environ | env)
    assert f"port {port} of 127.0.0.1 is taken; set MASTER_ADDR, and MASTER_PORT to a free one" in done.stdout
    assert free_port() != port
