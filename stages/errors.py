"""The errors that a user sees: what failed, on which path, why, and what to do."""


class AcetateError(Exception):
    """A stage that can't do its work.

    hint: what the user can do about it, or an empty string.
    exit_status: the status that the `acetate` command ends with.
    """

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        """Keep the message and the hint."""
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        """Return the message, and the hint on a line of its own."""
        message = str(self.args[0])
        return f"{message}\n{self.hint}" if self.hint else message


class UsageError(AcetateError):
    """Bad input, or an environment in which no run can work: nothing was made or touched."""

    exit_status = 2


class KeptError(AcetateError):
    """An error after which the changes of a run are kept, to be looked at, copied or dropped.

    run: the run's id.
    """

    def __init__(self, message: str, run: str, hint: str = "") -> None:
        """Keep the run's id with the message."""
        super().__init__(message, hint)
        self.run = run


class ConflictError(KeptError):
    """Somebody else changed paths of the changeset after the overlay was mounted; nothing was copied."""

    exit_status = 3


class CommandFailedError(KeptError):
    """The user's command ended with another status than 0."""

    def __init__(self, message: str, run: str, exit_status: int) -> None:
        """Keep the command's own status as the status to end with."""
        super().__init__(message, run)
        self.exit_status = exit_status


class UncopiedError(KeptError):
    """Cleanup would drop changes that were not copied."""
