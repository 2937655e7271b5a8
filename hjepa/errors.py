"""What can end a run, and with which exit code.

A user's mistake is one of these: one clear line (what, where, what to do) and no traceback. A programmer's
mistake is an assertion.
"""

from __future__ import annotations

import signal


def first_line(error: BaseException) -> str:
    """What an error says, in the one line that a user is shown; its kind where it says nothing."""
    text = str(error)
    return text.splitlines()[0] if text else type(error).__name__


class UserError(Exception):
    """A failure that the person at the keyboard can mend; its text is all they see."""

    exit_code = 1


class ConfigError(UserError):
    """A config that is refused; the text holds one line per mistake, all of the file at once."""

    exit_code = 2


class DataError(UserError):
    """Images that are missing, unreadable or too few."""

    exit_code = 3


class DivergedError(UserError):
    """The loss or the gradient was not finite, or the loss far above what it had been, too many steps in a row.

    Attributes:
        good: the last step before that.
    """

    exit_code = 4

    def __init__(self, text: str, good: int) -> None:
        super().__init__(text)
        self.good = good


class StorageError(UserError):
    """A file could not be written, or a checkpoint could not be trusted."""

    exit_code = 5


class MemoryFullError(UserError):
    """The device has less memory than the run takes."""

    exit_code = 6


class FolderInUseError(UserError):
    """The run's folder is held by another process, or holds a run that was not asked for."""

    exit_code = 75


class ProcessError(UserError):
    """Another process of the run failed, and this one ends with its exit code; or it is gone."""

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class StoppedError(UserError):
    """The run was asked to stop and did, all of it saved."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name} after a save; --resume goes on")
        # As shells count: 128 and the signal; every signal but Ctrl-C is the machine's, and means the same.
        self.exit_code = 128 + (signal.SIGINT if number is signal.SIGINT else signal.SIGTERM)
