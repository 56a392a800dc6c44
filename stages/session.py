"""One call of doit: the pipeline that its tasks share, what went wrong, and the exit status."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

from doit.exceptions import TaskFailed

from schemas.execute import Executed
from schemas.manifest import ManifestError
from stages import gc, request
from stages.errors import AcetateError, KeptError
from stages.pipeline import Pipeline


class Session:
    """What the tasks of one call share.

    exit_status: the status that the call is to end with; the first error decides.
    errors: what to tell the user at the end. kept_run: the run whose changes are kept after an error, or None.
    """

    def __init__(self, options: Callable[[], Mapping[str, str]], folder: Callable[[], str]) -> None:
        """Keep where options and the folder that the user stood in come from; they are asked for when needed."""
        self.options = options
        self.folder = folder
        self._pipeline: Pipeline | None = None
        self._swept = False
        self._refused: dict[str, Exception] = {}
        self.exit_status = 0
        self.errors: list[str] = []
        self.kept_run: str | None = None

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline; made from the options when it is first needed. Raises UsageError."""
        if self._pipeline is None:
            self._pipeline = request.pipeline(self.options(), self.folder())
        return self._pipeline

    def task(self, stage: str, after: str | None) -> dict[str, Any]:
        """Return the doit task of a stage; after: the stage that it depends on."""
        return {
            "actions": [(self.perform, [stage])],
            "uptodate": [(self.is_done, [stage])],
            "task_dep": [after] if after else [],
            "teardown": [self.close],
            "verbosity": 2,
        }

    def verb(self, function: Callable[[Mapping[str, str]], Iterable[str]]) -> dict[str, Any]:
        """Return the doit task of a verb that is about all runs; the function returns lines for the user."""
        return {"actions": [(self._print, [function])], "uptodate": [False], "verbosity": 2}

    def _print(self, function: Callable[[Mapping[str, str]], Iterable[str]]) -> TaskFailed | None:
        def lines() -> None:
            with contextlib.suppress(BrokenPipeError):  # the reader has seen enough
                for line in function(self.options()):
                    os.write(1, f"{line}\n".encode("utf-8", "backslashreplace"))

        return self._guarded("it", lines)

    def is_done(self, stage: str) -> bool:
        """Return whether the stage is done; an error is kept for `perform`, which reports it."""
        try:
            return self.pipeline.is_done(stage)
        except (AcetateError, OSError) as error:
            self._refused[stage] = error
            return False

    def perform(self, stage: str) -> TaskFailed | None:
        """Perform a stage; return a failure for doit when it failed."""

        def work() -> None:
            if stage in self._refused:
                raise self._refused[stage]
            if not self._swept:
                self._swept = True
                gc.release_broken_off()
            result = self.pipeline.perform(stage)
            if isinstance(result, Executed):
                self.exit_status = self.exit_status or result.exit_status

        return self._guarded(stage, work)

    def _guarded(self, what: str, work: Callable[[], None]) -> TaskFailed | None:
        """Do something; note what went wrong with it, and return a failure for doit then."""
        try:
            end_on_signals()
            work()
        except AcetateError as error:
            if isinstance(error, KeptError):
                self.kept_run = error.run
            return self._fail(str(error), error.exit_status)
        except (OSError, ManifestError) as error:
            return self._fail(f"{what} failed: {error}", 1)
        except (KeyboardInterrupt, SystemExit) as error:
            interrupted = 130 if isinstance(error, KeyboardInterrupt) else int(error.code or 1)
            self._fail(f"{what} was interrupted", interrupted)
            raise
        return None

    def _fail(self, message: str, exit_status: int) -> TaskFailed:
        self.errors.append(message)
        self.exit_status = self.exit_status or exit_status
        return TaskFailed(message)

    def close(self) -> None:
        """Release what the call holds: the mounts too, if a stage failed."""
        if self._pipeline is not None:
            self._pipeline.close()


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the program by way of its cleaning up."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)
