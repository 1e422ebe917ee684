"""The two exceptions that a user should ever see."""


class InputError(ValueError):
    """A mistake in a config, a file or the cluster that its owner can mend.

    The message is one sentence that names the thing, what was expected and what to do. The command line prints it
    without a traceback and exits with code 2, which job scripts read as "do not requeue".
    """


class RunError(RuntimeError):
    """A run that can't go on though its input is right: a diverged model, a full disk, a hung rank.

    The message explains it in a sentence; the command line prints it without a traceback and exits with code 1.
    """
