"""The ways in which a command ends early on purpose."""

import signal
from collections.abc import Sequence


class InputError(Exception):
    """The user's input or surroundings are wrong: the command prints the message on one line and exits with 2.

    The message says what is wrong, the value seen, and what to do about it. ``details`` are lines to print before it,
    where it sums up more than a line holds.
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = details


def words(error: Exception) -> str:
    """What the user reads of an InputError, or of an OSError in place of Python's own text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'while reading or writing'}; mend that and run the command again"
    return str(error)


class NewerFormat(InputError):  # noqa: N818 (what it is says it)
    """A directory was written by a later lit_sft: it is intact, and must be neither set aside nor replaced."""


class Interrupted(Exception):  # noqa: N818 (it is no error: the work was saved)
    """A signal ended the run after it saved; ``exit_code``: SIGINT 130, SIGTERM 143, SIGHUP 129, SIGUSR1 75."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75, signal.SIGHUP: 129}
"""Of a command that a signal ends."""
stops: list[int] = []
"""Exit codes of signals that came before a run's loop. Python drops an exception that a handler raises while some
object is being deleted; the loop reads them here."""


class RunFailed(Exception):  # noqa: N818 (it reads as a sentence)
    """The run cannot go on, through no fault of the input: the message says what was saved; exit code 1."""
