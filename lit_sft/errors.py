"""The ways in which a command ends early on purpose."""


class InputError(Exception):
    """The user's input or surroundings are wrong: the command prints the message on one line and exits with 2.

    The message says what is wrong, the value seen, and what to do about it.
    """


class Interrupted(Exception):  # noqa: N818 (it is no error: the work was saved)
    """A signal ended the run after it saved; ``exit_code`` is 130 (SIGINT), 143 (SIGTERM) or 75 (SIGUSR1)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


stops: list[int] = []
"""Exit codes of signals that came before a run's loop. Python drops an exception that a handler raises while some
object is being deleted; the loop reads them here."""


class RunFailed(Exception):  # noqa: N818 (it reads as a sentence)
    """The run cannot go on, through no fault of the input: the message says what was saved; exit code 1."""
