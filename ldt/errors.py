"""The only two exceptions that a user should see, and what the errors of libraries mean."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

OUT_OF_MEMORY = (
    "a GPU has no memory left; train.micro_batch=auto or a smaller one, engine.zero_stage=2 and "
    "model.activation_checkpointing=true need less"
)
NO_MEMORY = (
    "a node has no memory left; fewer processes a node, a smaller train.micro_batch, engine.zero_stage=2, fewer images "
    "at once need less"
)
LOST_RANK = (
    "another rank is gone: what it said stands in its own lines, a kill -9 or a lost node says nothing; run the same "
    "command again"
)
BROKEN_GPU = (
    "a GPU has failed; leave its node out (nvidia-smi -q and dmesg name the fault), and run the same command again"
)
KERNEL = (
    "a kernel failed on a GPU; if it happens again on another node, run once with CUDA_LAUNCH_BLOCKING=1 and report "
    "what it says, else leave the node out"
)

FAILURES = [
    (
        r"CUDA error: out of memory|Cuda failure.{0,4} 'out of memory'|Failed to (CUDA|Cuda)\w* (c|m)alloc",
        OUT_OF_MEMORY,
    ),
    (r"CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CUDNN_STATUS_ALLOC_FAILED|CUDA_ERROR_OUT_OF_MEMORY", OUT_OF_MEMORY),
    (
        r"DefaultCPUAllocator: can't allocate memory|Cannot allocate memory",
        NO_MEMORY,
    ),
    (
        r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed writing|unexpected pos \d+ vs",
        "a disk is full, perhaps that of temporary files, for which TMPDIR names another place; make room and run the "
        "same command again",
    ),
    (
        r"uncorrectable ECC|ECC error|fallen off the bus|hardware stack error|NVLink|CUDA error: unknown error",
        BROKEN_GPU,
    ),
    (
        r"illegal memory access|unspecified launch failure|misaligned address|illegal instruction|launch timed out|"
        r"device-side assert|CUDA_ERROR_LAUNCH_FAILED|CUBLAS_STATUS_EXECUTION_FAILED|CUDNN_STATUS_EXECUTION_FAILED",
        KERNEL,
    ),
    (
        r"no kernel image is available|driver version is insufficient|forward compatibility was attempted",
        "this torch does not fit the node's GPU or driver; install one whose CUDA the driver supports "
        "(nvidia-smi shows "
        "it), or use another node",
    ),
    (
        r"busy or unavailable|system not yet initialized|"
        r"invalid device ordinal|no CUDA-capable device|No CUDA GPUs are available",
        "a GPU can't be used; another process may hold it, or the driver's services are not running (nvidia-smi, "
        "nvidia-fabricmanager)",
    ),
    (
        r"Duplicate GPU detected|ncclInvalidUsage",
        "two ranks have the same GPU; start at most one process a GPU",
    ),
    (
        r"closed by (remote )?peer|reset by (remote )?peer|remote process exited|Broken pipe|ncclRemoteError|"
        r"communicator was aborted",
        LOST_RANK,
    ),
    (
        r"collective operation timeout|wait timeout after|[Tt]imed out (waiting|after)|ncclUniqueId|Socket Timeout|"
        r"Connection timed out",
        "another rank did not come in time; look for the rank that has said something else, or nothing; a network that "
        "hangs shows with NCCL_DEBUG=INFO",
    ),
    (
        r"ncclSystemError|ncclInternalError|unhandled system error|NCCL error|No route to host",
        "the network between the GPUs failed; NCCL_DEBUG=INFO says where, NCCL_SOCKET_IFNAME and NCCL_IB_HCA "
        "choose the "
        "interfaces",
    ),
]
"""What torch, CUDA, NCCL and gloo say, and what it means for the owner of a run; the first that fits counts."""

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MISPLACED = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Of a path that can't be one: below a file, a directory where a file is to be, too long a name."""
PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO,
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOLCK, errno.ENODEV, errno.ENXIO,
}  # fmt: skip
"""Of a disk or a network file system that is away, or of a machine short of something: it may be right again."""


def on_one_line(text: str) -> str:
    """A text with what is not printable escaped: the names in it may contain line breaks and terminals' commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


SHORTAGES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n), and run the same command again",
    errno.ENFILE: "run the same command again when this machine has fewer files open",
    errno.ENOMEM: "run the same command again when this machine has memory left",
    errno.EAGAIN: "run the same command again when this machine has fewer processes",
}
"""What a machine may be short of, and what helps; the other reasons that pass are a disk's or a network's."""


class _Sentence(Exception):
    """An error whose message stays on one line, whatever characters the names in it contain."""

    def __str__(self) -> str:
        return on_one_line(super().__str__())


class InputError(_Sentence, ValueError):
    """A mistake in a config, a file or the cluster that its owner can mend.

    The message is one sentence that names the thing, what was expected and what to do. The command line prints it
    without a traceback and exits with code 2, which job scripts read as "do not requeue".
    """


class RunError(_Sentence, RuntimeError):
    """A run that can't go on though its input is right: a diverged model, a full disk, a hung rank.

    The message explains it in a sentence; the command line prints it without a traceback and exits with code 1.
    """


def by_reason(sentence: str, error: BaseException) -> InputError | RunError:
    """A sentence about a failure: `RunError` where its reason may pass, as code 2 keeps a job from being tried again.

    A disk may have room again or come back; all else is an `InputError`. On a full disk the file without room is named.
    """
    if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename:
        return RunError(_sentence(error))
    passes = isinstance(error, OSError) and error.errno in (*PASSING, *NO_ROOM)
    return RunError(sentence) if passes else InputError(sentence)


def file_error(what: str, error: OSError, advice: str) -> InputError | RunError:
    """What is said of a file that can't be used, by `by_reason`. what: its kind and name; advice: how to mend it."""
    reason = error.strerror or str(error)
    if error.errno in NO_ROOM:
        return RunError(f"{what} could not be written ({reason}); make room and run it again")
    if error.errno in DENIED:
        return InputError(f"{what} can't be used by this user ({reason}); have its owner open it, or choose another")
    if error.errno in PASSING:
        advice = SHORTAGES.get(error.errno or 0, "run the same command again when its disk is back")
    return by_reason(f"{what} can't be used ({reason}); {advice}", error)


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """Turns expected runtime failures into a `RunError`: a lost rank, a full disk, no room on the GPU, a broken one.

    A file that this user may not read or write, or that can't be where it is said to be, is an `InputError`.

    All other errors pass as they are, with their traceback: they are mistakes of ours.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except MemoryError as error:
        raise RunError(f"{NO_MEMORY} ({' '.join(str(error).split()) or 'out of memory'})") from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in (*DENIED, *MISPLACED):
            raise file_error(_text(error.filename or "a file"), error, "give another path") from None
        sentence = _sentence(error)
        if not sentence:
            raise
        raise RunError(sentence) from None


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _sentence(error: OSError | RuntimeError) -> str:
    if isinstance(error, OSError):
        if error.errno in PASSING and error.filename:
            return str(file_error(error.filename, error, ""))
        if error.errno not in NO_ROOM:
            return ""
        where = f" of {error.filename}" if error.filename else ""
        return f"the disk{where} is full ({error.strerror}); make room and run the same command again"
    words = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":  # torch's; torch is slow to import
        return f"{OUT_OF_MEMORY} ({'. '.join(words.split('. ')[:2])})"
    for pattern, sentence in FAILURES:
        if found := re.search(pattern, words):
            return f"{sentence} ({_around(words, found)})"
    return ""


def _around(words: str, found: re.Match[str]) -> str:
    """What was said, from the beginning of the clause that was recognised, cut to a line."""
    start = max(words.rfind(mark, 0, found.start()) for mark in (". ", ", ", ": ", "; "))
    start = start + 2 if start >= 0 else 0
    return words[start : max(found.end(), start + 160)].strip()
