"""What can end a run, and with which exit code.

A user's mistake is one of these: one clear line (what, where, what to do) and no traceback. A programmer's
mistake is an assertion.
"""


class UserError(Exception):
    """A failure that the person at the keyboard can mend; its text is all they see."""

    exit_code = 1


class ConfigError(UserError):
    """A config that is refused; the text holds one line per mistake, all of the file at once."""

    exit_code = 2


class DataError(UserError):
    """Images that are missing, unreadable or too few."""

    exit_code = 3


class NonFiniteError(UserError):
    """The loss or the gradient was not finite too many steps in a row."""

    exit_code = 4


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
