"""The deepspeed launcher on several nodes: over pdsh and ssh from a hostfile, and without ssh, started on each node."""

import subprocess
import sys
from pathlib import Path

from cluster import ROOT
from cluster_runs import check_same_run, write_config

from ldt.dist import free_port

DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed")]


def test_a_hostfile_over_ssh(slurm, plain, tmp_path):
    """2 nodes x 2 ranks through real sshds."""
    config, prefix = write_config(tmp_path), slurm.env["SLURM_CLUSTER_PREFIX"]
    (tmp_path / "hosts").write_text(f"{prefix}1 slots=2\n{prefix}2 slots=2\n")
    command = [*DEEPSPEED, f"--hostfile={tmp_path}/hosts", "--module", "ldt", "train", str(config)]
    done = subprocess.run(command, env=slurm.env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = check_same_run(tmp_path / "run", plain)
    assert {r["world_size"] for r in lines} == {4}


def test_an_unreachable_host_is_named(slurm, tmp_path):
    config = write_config(tmp_path)
    (tmp_path / "hosts").write_text("nowhere.invalid slots=1\nnowhere2.invalid slots=1\n")
    command = [*DEEPSPEED, f"--hostfile={tmp_path}/hosts", "--module", "ldt", "train", str(config)]
    done = subprocess.run(command, env=slurm.env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "nowhere.invalid" in done.stdout + done.stderr


def test_without_ssh_on_each_node(plain, tmp_path):
    """The same command with another --node_rank on each of two nodes (here: twice on this machine)."""
    config, port = write_config(tmp_path), free_port()
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    command = [
        *DEEPSPEED,
        f"--hostfile={tmp_path}/hosts",
        "--no_ssh",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]
    nodes = [
        subprocess.Popen(
            [*command, f"--node_rank={node}", "--module", "ldt", "train", str(config)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    told = [p.communicate(timeout=300)[0] for p in nodes]
    assert [p.returncode for p in nodes] == [0, 0], told
    lines = check_same_run(tmp_path / "run", plain)
    assert {r["world_size"] for r in lines} == {2}
