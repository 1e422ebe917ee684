"""`tools/gpu_check.sh`: short runs on this machine's GPUs against the same run on the CPU, kernels against formulas.

Digests must be equal to the CPU's, losses in float32 without TF32 equal to 5 digits and in bf16 to 2 %, every attention
kernel equal to the textbook formula in float64. Rates are noted, and judged by nobody.
"""

import argparse
import html
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_train import matrix_peak
from program import run_tool
from shard_data import write_shards

from ldt.cluster.gpus import choose_arithmetic
from ldt.files import write_atomic, write_json
from ldt.log import read_jsonl
from ldt.nn import attention

ROOT = Path(__file__).parents[1]
STEPS, BATCH = 20, 24
SETTINGS = [
    "model={width: 64, depth: 4, heads: 2}", f"train.global_batch={BATCH}", f"train.total_samples={STEPS * BATCH}",
    f"log.every_samples={BATCH}", "optimizer.lr=1e-3", "optimizer.clip=1.0", "objective.condition_drop=0.1",
]  # fmt: skip
EXACT = "engine.deterministic=true"  # also no TF32
Check = tuple[str, Callable[[], dict[str, Any]]]


def main() -> int:
    """Run the checks; 1 if one of them is red."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="checks whose names hold one of these")
    arguments = parser.parse_args()
    directory: Path = arguments.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    results = []
    for name, check in checks(directory):
        if name != "reference" and not any(word in name for word in arguments.only):
            continue
        start = time.time()
        try:
            found = check()
        except Exception as error:  # whatever fails on a new machine is a finding
            found = {"ok": False, "detail": f"{type(error).__name__}: {error}"[-2000:]}
        results.append({"name": name, **found, "seconds": round(time.time() - start, 1)})
        print(f"{'ok ' if found['ok'] else 'RED'}  {name:28} {results[-1]['seconds']:6.1f} s  {found['detail'][:120]}")
    report = {"machine": machine(), "checks": results, "ok": all(r["ok"] for r in results)}
    write_json(directory / "gpu_check.json", report)
    write_atomic(directory / "gpu_check.html", page(report).encode())
    red = [r["name"] for r in results if not r["ok"]]
    print(f"{'red: ' + ', '.join(red) if red else 'all is well'}: {directory}/gpu_check.html")
    return 1 if red else 0


def checks(directory: Path) -> Iterator[Check]:
    """Names, and what to do; the first makes what the others are compared with."""
    cuda, gpus = torch.cuda.is_available(), torch.cuda.device_count()
    most = gpus if cuda else 2
    yield "reference", partial(reference, directory)
    for processes in sorted({1, most}):
        for stage in range(4):
            name = f"fp32-zero{stage}-{processes}"
            yield name, partial(train, directory, name, processes, 1e-5, f"engine.zero_stage={stage}", EXACT)
    half = "engine.precision=bf16"
    for stage in (1, 2, 3):
        name = f"bf16-zero{stage}-{most}"
        yield name, partial(train, directory, name, most, 0.02, f"engine.zero_stage={stage}", half)
    name = f"bf16-compiled-{most}"
    yield name, partial(train, directory, name, most, 0.02, "engine.compile=true", half)
    name = f"muon-{most}"
    yield name, partial(train, directory, name, most, 1e-4, "optimizer.muon_lr=0.02", EXACT, like="muon")
    yield "attention", attention_parity
    if cuda:
        yield "rates", rates


def reference(directory: Path) -> dict[str, Any]:
    """The run of one process on the CPU, with AdamW and with Muon."""
    if not (directory / "data").exists():
        write_shards(directory / "data", [40, 23, 30], latent_shape=(4, 8, 8))
    for name, more in (("cpu", []), ("cpu-muon", ["optimizer.muon_lr=0.02"])):
        run(directory, name, 1, {"CUDA_VISIBLE_DEVICES": ""}, *more)
    return {"ok": True, "detail": f"{len(lines(directory, 'cpu'))} steps on the CPU"}


def train(directory: Path, name: str, processes: int, digits: float, *settings: str, like: str = "") -> dict[str, Any]:
    """The same run here: digests equal, losses within `digits` of the reference's."""
    run(directory, name, processes, {}, *settings)
    here, there = lines(directory, name), lines(directory, f"cpu-{like}" if like else "cpu")
    same = [r["digest"] for r in here] == [r["digest"] for r in there]
    off = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(here, there, strict=True))
    words = f"digests {'equal' if same else 'DIFFER'}, losses {off:.1e} off (at most {digits:g})"
    return {"ok": same and off <= digits, "detail": words, "images_per_second": here[-1]["images_per_second"]}


def run(directory: Path, name: str, processes: int, env: dict[str, str], *settings: str) -> None:
    """One training under torchrun; its words are in the error if it fails."""
    launcher = ["torchrun", "--nproc_per_node", str(processes), "-m"] if processes > 1 else [sys.executable, "-m"]
    where = [f"data.path={directory / 'data'}", f"run_dir={directory / name}"]
    command = [*launcher, "ldt", "train", *SETTINGS, *where, *settings, "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-1500:]}")


def lines(directory: Path, name: str) -> list[dict[str, Any]]:
    return [r for r in read_jsonl(directory / name / "metrics.jsonl") if "loss" in r]


def attention_parity() -> dict[str, Any]:
    """Every kernel that runs here against the formula in float64, with and without padding, forward and backward."""
    choose_arithmetic()
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    kernels = {attention.choose_kernel("auto", device, dtype), "sdpa", *(["cudnn"] if cuda else []), *attention.FLASH}
    worst: dict[str, float] = {}
    for kernel in sorted(kernels):
        for masked in (False, True):
            worst[f"{kernel}{' padded' if masked else ''}"] = _distance(kernel, device, dtype, masked)
    limit = 0.03 if cuda else 1e-5
    detail = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    return {"ok": max(worst.values()) <= limit, "detail": f"{detail} (at most {limit:g})"}


def _distance(kernel: str, device: torch.device, dtype: torch.dtype, masked: bool) -> float:
    """The largest difference of outputs and gradients, relative to the largest value."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(4, 3, 77, 72, generator=g).to(device, dtype) for _ in range(4)]
    mask = (torch.arange(77) < torch.tensor([[77], [50], [20], [1]])).to(device)
    found = []
    for name in (kernel, "reference"):
        q, k, v, weight = (x.clone().requires_grad_() for x in tensors)
        out = attention.attend(q, k, v, name, attention.padding_of(mask, name) if masked else None)
        (out * weight).sum().backward()
        found.append([out.detach(), q.grad, k.grad, v.grad])
    pairs = zip(*found, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if a is not None and b is not None)


def rates() -> dict[str, Any]:
    """What `ldt plan` assumes: matrix products and memory bandwidth."""
    device = torch.device("cuda")
    peak = matrix_peak(device, "bf16")
    x = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    x.clone()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        x.clone()
    torch.cuda.synchronize()
    moved = 20 * 2 * x.numel() / (time.perf_counter() - start)
    return {"ok": True, "detail": f"{peak / 1e12:.0f} TFLOP/s of products, {moved / 1e12:.2f} TB/s", "peak": peak}


def machine() -> dict[str, Any]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    about = {"gpus": names, "torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return about | {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip()}


def page(report: dict[str, Any]) -> str:
    """One table."""
    cells = [
        f"<tr style='background:{'#dfd' if r['ok'] else '#fbb'}'><td>{r['name']}</td>"
        f"<td>{r['seconds']}</td><td>{html.escape(r['detail'])}</td></tr>"
        for r in report["checks"]
    ]
    head = "<tr><th>check</th><th>seconds</th><th>what came out</th></tr>"
    about = html.escape(json.dumps(report["machine"]))
    table = f"<table>{head}{''.join(cells)}</table>"
    return f"<!doctype html><meta charset=utf-8><title>GPU check</title><p>{about}</p>{table}\n"


if __name__ == "__main__":
    run_tool(main)
