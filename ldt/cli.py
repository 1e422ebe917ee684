"""The `ldt` command: finds the program, its config and its overrides, and turns the outcome into an exit code."""

import argparse
import gc
import importlib
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from ldt import __version__, config, log
from ldt.checkpoint.checkpoint import saved_config
from ldt.cluster.launchers import place
from ldt.errors import NO_ROOM, InputError, RunError, in_a_sentence
from ldt.paths import local_path
from ldt.run import stop
from ldt.run.outcome import DONE, FAILED, WRONG_INPUT

INTERRUPTED = 130  # as shells say it


class Command(NamedTuple):
    """A program: `ldt.commands.<module>` has the dataclass `job` of its keys and `run(job) -> exit code`."""

    module: str
    job: str
    usage: str
    summary: str
    positional: str = ""  # the field that takes arguments which are neither a YAML file nor key=value
    reads_run_config: bool = False  # without a YAML file, start from the run's own config
    options: tuple[str, ...] = ()  # fields that may be given as --field VALUE too
    sweeps: bool = False  # key=a,b stands for one job each; its module has `run_sweep(jobs)` too


COMMANDS = {
    "encode": Command("encode", "EncodeJob", "CONFIG [key=value ...]", "images → latent shards and a manifest"),
    "train": Command("train", "TrainJob", "CONFIG [key=value ...]", "train a denoiser, or resume where it stopped"),
    "sample": Command("sample", "SampleJob", "RUN|CHECKPOINT [key=value ...]", "draw images from a checkpoint", "run"),
    "evaluate": Command(
        "evaluate",
        "EvaluateJob",
        "RUN|CHECKPOINT [key=value ...]",
        "score a checkpoint against real images",
        "run",
        reads_run_config=True,
        sweeps=True,
    ),
    "score": Command(
        "score",
        "ScoreJob",
        "IMAGES reference=REAL [against=OTHER] [key=value ...]",
        "score any set of images against real ones, or two of them",
        "images",
    ),
    "inspect": Command(
        "inspect", "InspectJob", "PATH [key=value ...]", "what a path holds, and whether it is whole", "path"
    ),
    "status": Command("status", "StatusJob", "RUN [json=true]", "what a run is doing, from its files alone", "run"),
    "verdict": Command(
        "verdict",
        "VerdictJob",
        "CONFIG [key=value ...] launcher_code=N",
        "for job scripts: the exit code that a training earned",
    ),
    "export": Command(
        "export",
        "ExportJob",
        "RUN|CHECKPOINT --to DIR [--ema-width W]",
        "weights as safetensors",
        "run",
        options=("to", "ema_width", "format"),
    ),
    "import": Command(
        "import_model",
        "ImportJob",
        "WEIGHTS.pt to=DIR autoencoder=NAME",
        "others' public weights as a model",
        "weights",
    ),
    "plan": Command(
        "plan", "PlanJob", "CONFIG nodes=N gpus=8 device=h100", "memory, traffic, step time and cost of a future run"
    ),
    "bench data": Command(
        "bench_data",
        "BenchDataJob",
        "RUN|DIR [key=value ...]",
        "each stage of loading alone, and the bottleneck",
        "path",
    ),
    "bench encode": Command(
        "bench_encode", "BenchEncodeJob", "CONFIG [key=value ...]", "how fast each stage of encoding is"
    ),
    "replay": Command(
        "replay", "ReplayJob", "RUN [to=wandb|tensorboard]", "send a run's log to a tracker afterwards", "run"
    ),
    "verify": Command(
        "verify",
        "VerifyJob",
        "RUN|RECORD [samples=N] [key=value ...]",
        "train a run's first samples again: is it the same run?",
        "run",
        reads_run_config=True,
    ),
    "report": Command(
        "report", "ReportJob", "RUN [RUN ...] [key=value ...]", "one HTML page about one or several runs", "runs"
    ),
}

HELP = """\
ldt {version}: distributed training of latent diffusion Transformers

usage: ldt COMMAND [CONFIG.yaml] [key=value ...] [--dry-run] [--quiet]

{commands}

A run goes through four of them; each stage is a job of its own and re-running it resumes:

  ldt encode configs/encode/fashion_mnist.yaml        images → data/fashion_mnist
  ldt train configs/debug.yaml                        latents → runs/debug
  ldt evaluate runs/debug evaluate.images=1000        checkpoint → runs/debug/evaluations.jsonl
  ldt report runs/debug                               everything → runs/debug/report.html

On several processes or nodes the same program runs under any launcher:

  torchrun --nproc_per_node 8 -m ldt train CONFIG.yaml
  deepspeed --hostfile hosts --module ldt train CONFIG.yaml
  srun python -m ldt train CONFIG.yaml

Every key of the YAML can be given as key=value; `ldt COMMAND --help` lists a command's keys with their defaults, and
--dry-run prints the resolved config without doing anything.
Exit codes: 0 done, 1 failed, 2 wrong config or input, 75 stopped on request after a checkpoint, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths and names of classes may be in any encoding
    # the deepspeed launcher puts --local_rank=N before the command
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return DONE
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return DONE
    parts = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:parts]), arguments[parts:]
    if name == "train":
        stop.listen()  # a request that comes while torch is being imported counts too
    try:
        with in_a_sentence():
            return _run_and_flush(name, rest)
    except InputError as error:
        print(f"ldt {name}: error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except RunError as error:
        print(f"ldt {name}: failed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"ldt {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return FAILED


def _run_and_flush(name: str, words: list[str]) -> int:
    """`_run`, and then write what was printed: where that has no room, Python says so at its end, by code 120."""
    try:
        code = _run(name, words)
        sys.stdout.flush()
    except OSError as error:
        if error.errno in NO_ROOM and not error.filename and not os.fstatvfs(sys.stdout.fileno()).f_bavail:
            error.filename = "the standard output"
            _to_nowhere()
        raise
    return code


def _to_nowhere() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has ended, as `| head` does; then no further output can be read."""
    stdout = select.poll()
    stdout.register(sys.stdout.fileno(), 0)
    if not stdout.poll(0):
        return False
    _to_nowhere()
    return True


def _run(name: str, words: list[str]) -> int:
    if strange := next((word for word in words if not _is_text(word)), ""):
        raise InputError(f"argument {strange} is not text in UTF-8; give the file or directory another name")
    if name not in COMMANDS:
        raise InputError(f"there is no such command; the commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    program = _imported(f"ldt.commands.{command.module}")
    job = getattr(program, command.job)
    flags = _parser(name, command).parse_intermixed_args(words)
    if flags.help:
        print(_command_help(name, command, program, job))
        return DONE
    if not words:
        raise InputError(f"it needs arguments; usage: ldt {name} {command.usage}; ldt {name} --help lists the keys")
    path, overrides, given = _split(name, command, flags.words)
    base = _config_of_run(overrides, given) if command.reads_run_config and path is None else {}
    overrides += [f"{field}={value}" for field in command.options if (value := getattr(flags, field)) is not None]
    overrides += ["watch=true"] if flags.watch else []
    variants = config.sweep(overrides) if command.sweeps else [overrides]
    jobs: list[Any] = [config.load(job, path, words, given, base) for words in variants]
    rank = place().rank
    if flags.dry_run:
        if rank == 0:
            print("---\n".join(map(config.to_yaml, jobs)), end="")
        return DONE
    log.configure(rank, quiet=flags.quiet)
    return int(program.run_sweep(jobs) if len(jobs) > 1 else program.run(jobs[0]))


def _imported(module: str) -> Any:
    """A program's module. The garbage collector would look 400 times while torch is imported (0.2 s)."""
    if not gc.isenabled():
        return importlib.import_module(module)
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.enable()


def _is_text(word: str) -> bool:
    """Whether a word of the command line is text; Python keeps the bytes of others as surrogates."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Parser(argparse.ArgumentParser):
    """Flags before, between and after `key=value`; mistakes are `InputError`s."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; settings are given as key=value, flags are --dry-run, --quiet, --help")


def _parser(name: str, command: Command) -> _Parser:
    parser = _Parser(prog=f"ldt {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    for flag in ("--dry-run", "--quiet", "--watch"):
        parser.add_argument(flag, action="store_true")
    for field in command.options:
        parser.add_argument(f"--{field.replace('_', '-')}", dest=field)
    return parser


def _split(name: str, command: Command, words: list[str]) -> tuple[str | None, list[str], dict[str, Any]]:
    """The YAML file, if any, the overrides, and the positional arguments by their field."""
    overrides = [w for w in words if _is_setting(w, command)]
    files = [w for w in words if w not in overrides and w.endswith((".yaml", ".yml"))]
    others = [w for w in words if w not in overrides and w not in files]
    if len(files) > 1:
        raise InputError(f"one config at a time, not {' and '.join(files)}")
    if others and not command.positional:
        raise InputError(
            f"argument {others[0]!r} is neither a .yaml file nor key=value; usage: ldt {name} {command.usage}"
        )
    if len(others) > 1 and command.positional != "runs":
        raise InputError(f"one {command.positional} at a time, not {' and '.join(others)}")
    values: Any = others if command.positional == "runs" else "".join(others)
    return (files[0] if files else None), overrides, ({command.positional: values} if others else {})


def _is_setting(word: str, command: Command) -> bool:
    """Whether a word is key=value. A path may hold a = too, as those of a sweep's runs do; a key has no slash."""
    key, separator, _ = word.partition("=")
    is_path = "/" in key or (command.positional and os.path.exists(word))  # Path.exists raises for long words
    return bool(separator) and not is_path


def _config_of_run(overrides: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """The config that the run, checkpoint or exported model among the arguments was made with."""
    run = given.get("run") or next((o.removeprefix("run=") for o in overrides if o.startswith("run=")), "")
    return saved_config(local_path(run, "run")) if run else {}


def _help() -> str:
    width = max(len(f"{name} {c.usage}") for name, c in COMMANDS.items())
    lines = [f"  {f'{name} {c.usage}':<{width}}  {c.summary}" for name, c in COMMANDS.items()]
    return HELP.format(version=__version__, commands="\n".join(lines))


def _command_help(name: str, command: Command, program: Any, job: type) -> str:
    defaults = config.defaults_yaml(job)
    return f"usage: ldt {name} {command.usage}\n\n{(program.__doc__ or '').strip()}\n\nKeys and defaults:\n\n{defaults}"
