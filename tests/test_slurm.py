"""Jobs on a real SLURM: every one ends as the same run that one process makes, whatever happened to it on the way."""

import subprocess
import sys
import time

import forked
from cluster import ROOT, outcome
from cluster_runs import check_same_run, training_lines, write_config
from run_data import make_autoencoder, make_images
from small_disk import mounted

from ldt.cluster.job import is_alive
from ldt.log import read_jsonl
from ldt.run.outcome import read_outcome


def test_a_request_to_stop_is_requeued_and_resumed(slurm, plain, tmp_path):
    """2 nodes x 2 ranks, USR1 to the batch script: checkpoint, requeue, resume, done."""
    config = write_config(tmp_path)
    job = slurm.sbatch("--nodes=2", "--gpus-per-node=2", f"--output={tmp_path}/log", "slurm/train.sh", config)
    slurm.wait_for_steps(tmp_path / "run", 5)
    slurm.request_stop(job)
    info = slurm.wait(job)
    log = (tmp_path / "log").read_text()
    assert (info["JobState"], info["Restarts"]) == ("COMPLETED", "1"), log
    assert "stopped on request: requeued" in log and "start 1: 2 nodes" in log
    lines = check_same_run(tmp_path / "run", plain)
    assert {r["world_size"] for r in lines} == {4} and {r["attempt"] for r in lines} == {0, 1}
    attempts = list(read_jsonl(tmp_path / "run" / "environment.jsonl"))
    assert [a["job"] for a in attempts] == [job, job] and [a["restart"] for a in attempts] == ["0", "1"]


def test_a_job_of_another_partition_takes_its_place_for_a_while(slurm, plain, tmp_path):
    """preempt/partition_prio with a grace time: saved within it, requeued, resumed when the other job has ended."""
    config = write_config(tmp_path)
    flags = ["--nodes=1", "--partition=low", f"--output={tmp_path}/log", "--export=ALL,LDT_TASKS_PER_NODE=2"]
    job = slurm.sbatch(*flags, "slurm/train.sh", config)
    slurm.wait_for_steps(tmp_path / "run", 5)
    other = slurm.sbatch("--nodes=4", "--exclusive", "--partition=high", "--output=/dev/null", "--wrap=sleep 3")
    info = slurm.wait(job)
    log = (tmp_path / "log").read_text()
    assert (info["JobState"], info["Restarts"]) == ("COMPLETED", "1"), log
    assert slurm.info(other)["JobState"] == "COMPLETED" and "stopped on request" in log, log
    lines = check_same_run(tmp_path / "run", plain)
    assert [r["attempt"] for r in lines] == sorted(r["attempt"] for r in lines) and lines[-1]["attempt"] == 1


def test_a_lost_node_is_left_behind(slurm, plain, tmp_path):
    """An elastic job on four nodes loses one: requeued on three, resumed from the last checkpoint."""
    config, prefix = write_config(tmp_path), slurm.env["SLURM_CLUSTER_PREFIX"]
    flags = ["--nodes=2-4", "--exclusive", f"--output={tmp_path}/log", "--export=ALL,LDT_TASKS_PER_NODE=1"]
    job = slurm.sbatch(*flags, "slurm/train.sh", config, "engine.zero_stage=2")
    slurm.wait_for_steps(tmp_path / "run", 30)
    slurm.kill_node(f"{prefix}3")
    info = slurm.wait(job)
    log = (tmp_path / "log").read_text()
    assert info["JobState"] == "COMPLETED", log
    assert "start 0: 4 nodes" in log and "start 1: 3 nodes" in log
    lines = check_same_run(tmp_path / "run", plain)
    assert {r["world_size"] for r in lines} == {4, 3}


def test_mistakes_and_crashes_are_not_requeued(slurm, tmp_path):
    """A wrong key ends with 2, a killed rank with 1, and a job over its cap of restarts with 75."""
    config, run_dir = write_config(tmp_path), tmp_path / "run"
    flags = ["--nodes=1", f"--output={tmp_path}/log-%j", "--export=ALL,LDT_TASKS_PER_NODE=2,LDT_MAX_RESTARTS=0"]
    wrong = slurm.sbatch(*flags, "slurm/train.sh", config, "optimizer.rate=1")
    crash = slurm.sbatch(*flags, "slurm/train.sh", config, f"run_dir={tmp_path}/crash", "train.total_samples=800000")
    info = slurm.wait(wrong)
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", "2:0", "0")
    assert "did you mean optimizer" in (tmp_path / f"log-{wrong}").read_text()
    slurm.wait_for_steps(tmp_path / "crash", 3)
    slurm.sh("scancel", "--signal=KILL", f"{crash}.0")
    info = slurm.wait(crash)
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", "1:0", "0")
    assert outcome(tmp_path / "crash")["message"].startswith("crashed: its launcher ended with code")
    capped = slurm.sbatch(*flags, "slurm/train.sh", config, "train.total_samples=800000")
    slurm.wait_for_steps(run_dir, 3)
    slurm.request_stop(capped)
    info = slurm.wait(capped)
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", "75:0", "0")
    assert outcome(run_dir)["outcome"] == "stopped"


def test_submitit_sweeps_requeues_and_refuses(slurm, plain, tmp_path):
    """tools/submit.py: a job array of two runs, one of which is asked to stop and requeues itself."""
    config = write_config(tmp_path)
    command = [sys.executable, "tools/submit.py", config, "optimizer.lr=1e-3,2e-3", "tasks=2", f"logs={tmp_path}/logs"]
    told = slurm.sh(*command).splitlines()
    jobs = [line.split()[1].rstrip(":") for line in told]
    assert len(jobs) == 2 and jobs[0].endswith("_0") and f"{tmp_path}/run/optimizer.lr=2e-3" in told[1]
    first, second = (tmp_path / "run" / f"optimizer.lr={lr}" for lr in ("1e-3", "2e-3"))
    slurm.wait_for_steps(first, 5)
    slurm.sh("scancel", "--signal=USR1", jobs[0])
    infos = [slurm.wait(job) for job in jobs]
    logs = "".join(p.read_text() for p in (tmp_path / "logs").glob("*_log.*"))
    assert [i["JobState"] for i in infos] == ["COMPLETED", "COMPLETED"], logs
    assert [i["Restarts"] for i in infos] == ["1", "0"], logs
    lines = check_same_run(first, plain)
    assert {r["attempt"] for r in lines} == {0, 1} and {r["world_size"] for r in lines} == {2}
    assert [r["digest"] for r in training_lines(second)] == [r["digest"] for r in plain]
    assert training_lines(second)[-1]["loss"] != plain[-1]["loss"]


def test_refusals_keep_the_words_of_slurm(slurm, tmp_path):
    config = write_config(tmp_path)
    command = ["tools/submit.py", config, f"logs={tmp_path}/logs"]

    def refused(*arguments, env=slurm.env, code=2):
        done = forked.run(*command, *arguments, env=env, cwd=ROOT)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    assert "invalid partition specified: nowhere" in refused("slurm.partition=nowhere")
    assert "SLURM refused the job" in refused("gpus=64")
    assert "unknown key optimizer.rate" in refused("optimizer.rate=1")
    assert "nodes=2 must be 1" in refused("cluster=local", "nodes=2")
    assert "neither slurm, local, a file" in refused("cluster=mars")
    assert "there is no sbatch on this machine" in refused(env=slurm.env | {"PATH": "/nowhere"})
    with mounted(tmp_path / "full") as disk:
        for pages in (0, 1):  # its pickle; its job script
            disk.leave(pages)
            said = refused(f"logs={disk.path}", code=1)
            assert f"logs={disk.path} could not be written (No space left on device); make room" in said
    assert f"logs={config} can't be used" in refused(f"logs={config}")
    dry = [sys.executable, *command, "--dry-run"]
    told = slurm.sh(*dry, "seed=1,2", "model={width: 48, depth: 2, heads: 2}").splitlines()
    assert len(told) == 3 and told[2].startswith("to slurm, nodes=1")
    assert f"run_dir={tmp_path}/run/seed=1" in told[0] and f"run_dir={tmp_path}/run/seed=2" in told[1]
    assert not slurm.sh("squeue", "-h")
    told = slurm.sh(*dry, "cluster=example")
    assert told.startswith("would submit: ldt train"), "a site's file"


def test_encode_train_and_evaluate_are_a_chain(slurm, tmp_path):
    """slurm/encode.sh; then tools/submit.py with an evaluation that waits for the training."""
    make_autoencoder(tmp_path / "autoencoder")
    make_images(tmp_path / "images", 24)
    data = ["images.size=32", "images.fit=pad", f"images.path={tmp_path}/images"]
    data += [f"autoencoder={tmp_path}/autoencoder", f"output={tmp_path}/data", "shard_samples=8"]
    flags = [f"--output={tmp_path}/log-%j", "--export=ALL,LDT_TASKS_PER_NODE=2"]
    encode = slurm.sbatch(*flags, "slurm/encode.sh", *data)
    assert slurm.wait(encode)["JobState"] == "COMPLETED", (tmp_path / f"log-{encode}").read_text()
    run = [f"run_dir={tmp_path}/run", f"data.path={tmp_path}/data", "model={width: 32, depth: 1, heads: 2}"]
    run += ["train.global_batch=8", "train.total_samples=40", "evaluate={images: 12, block: 6, steps: 1}"]
    told = slurm.sh(
        sys.executable, "tools/submit.py", *run, "evaluation=after", "evaluation_tasks=2", f"logs={tmp_path}/logs"
    )
    train, evaluate = (line.split()[1].rstrip(":") for line in told.splitlines())
    infos = [slurm.wait(job) for job in (train, evaluate)]
    logs = "".join(p.read_text() for p in (tmp_path / "logs").glob("*_log.*"))
    assert [i["JobState"] for i in infos] == ["COMPLETED", "COMPLETED"], logs
    (score,) = read_jsonl(tmp_path / "run" / "evaluations.jsonl")
    assert score["samples_seen"] == 40 and score["world_size"] == 2
    # the script on the same run finds it scored
    again = slurm.sbatch(*flags, "slurm/evaluate.sh", tmp_path / "run", "--watch")
    assert slurm.wait(again)["JobState"] == "COMPLETED"
    assert len(list(read_jsonl(tmp_path / "run" / "evaluations.jsonl"))) == 1


def test_whether_a_job_is_alive(slurm, monkeypatch):
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # as in the job of an evaluation
    running = slurm.sbatch("--exclusive", "--nodes=4", "--output=/dev/null", "--wrap=sleep 600")
    waiting = slurm.sbatch("--exclusive", "--nodes=4", "--output=/dev/null", "--wrap=sleep 600")
    assert is_alive(running) and is_alive(waiting)
    slurm.sh("scancel", running)
    slurm.until(lambda: is_alive(running) is False, "end of the job")
    assert is_alive(waiting) and is_alive("999999") is False
    monkeypatch.setenv("PATH", "/nowhere")
    assert is_alive(waiting) is None


def test_submitit_on_this_machine(plain, tmp_path):
    """cluster=local: the same job as two processes here."""
    config = write_config(tmp_path)
    command = [sys.executable, "tools/submit.py", config, "cluster=local", "tasks=2", f"logs={tmp_path}/logs"]
    told = subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert told.startswith("job ") and f"ldt status {tmp_path}/run" in told
    end = time.monotonic() + 120
    while time.monotonic() < end and (read_outcome(tmp_path / "run").get("outcome") in (None, "running")):
        time.sleep(0.2)
    lines = check_same_run(tmp_path / "run", plain)
    assert {r["world_size"] for r in lines} == {2}
