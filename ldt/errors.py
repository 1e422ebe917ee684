"""The two exceptions that a user should ever see, and what others mean."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO,
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOLCK, errno.ENODEV, errno.ENXIO,
}  # fmt: skip
"""Of a disk or a network file system that is away, or of a machine short of something: it may be right again."""
LOST_RANK = re.compile(r"closed by peer|reset by peer|remote process exited|Broken pipe")  # gloo's words and NCCL's


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


def file_error(what: str, error: OSError, advice: str) -> InputError | RunError:
    """What is told of a file that can't be used. what: its kind and name; advice: where its owner has to mend it.

    A `RunError` where the same command may go on later: code 2 would keep a job from being tried again.
    """
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError):
        return InputError(f"{what} can't be used by this user ({reason}); have its owner open it, or choose another")
    if error.errno in PASSING:
        return RunError(f"{what} can't be used ({reason}); run the same command again when its disk is back")
    return InputError(f"{what} can't be used ({reason}); {advice}")


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """What befalls a run that is right, said as a `RunError`: a lost rank, a full disk, no room on the GPU.

    All other errors pass as they are, with their traceback: they are mistakes of ours.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except PermissionError as error:
        raise file_error(error.filename or "a file", error, "") from None
    except (OSError, RuntimeError) as error:
        sentence = _sentence(error)
        if not sentence:
            raise
        raise RunError(sentence) from None


def _sentence(error: OSError | RuntimeError) -> str:
    if isinstance(error, OSError):
        if error.errno in PASSING and error.filename:
            return str(file_error(error.filename, error, ""))
        if error.errno not in NO_ROOM:
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
