"""The two exceptions that a user should ever see, and what others mean."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

LOST_RANK = re.compile(r"closed by peer|reset by peer|remote process exited|Broken pipe")  # gloo's words and NCCL's

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Sentence(Exception):
    """Its message stays on one line, whatever the names in it hold."""

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())


class InputError(_Sentence, ValueError):
    """A mistake in a config, a file or the cluster that its owner can mend.

    The message is one sentence that names the thing, what was expected and what to do. The command line prints it
    without a traceback and exits with code 2, which job scripts read as "do not requeue".
    """


class RunError(_Sentence, RuntimeError):
    """A run that can't go on though its input is right: a diverged model, a full disk, a hung rank.

    The message explains it in a sentence; the command line prints it without a traceback and exits with code 1.
    """


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """What befalls a run that is right, said as a `RunError`: a lost rank, a full disk, no room on the GPU.

    A file that this user may not read or write is an `InputError`.

    All other errors pass as they are, with their traceback: they are mistakes of ours.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in DENIED and error.filename:
            raise InputError(
                f"{_text(error.filename)} can't be read or written ({error.strerror}); change its permissions, or "
                "give another place"
            ) from None
        sentence = _sentence(error)
        if not sentence:
            raise
        raise RunError(sentence) from None


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _sentence(error: OSError | RuntimeError) -> str:
    if isinstance(error, OSError):
        if error.errno not in DISK_FULL:
            return ""
        where = f" of {error.filename}" if error.filename else ""
        return f"the disk{where} is full ({error.strerror}); make room and run the same command again"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; torch is slow to import
        return (
            "a GPU has no memory left; train.micro_batch=auto or a smaller one, engine.zero_stage=2 and "
            f"model.activation_checkpointing=true need less ({'. '.join(str(error).split('. ')[:2])})"
        )
    gone = LOST_RANK.search(str(error))
    if gone:
        return (
            f"another rank is gone ({gone[0]}): what it said stands in its own lines, a kill -9 says nothing; "
            "run the same command again"
        )
    return ""
