"""What a call tells its user: the changes, a summary, errors. Written for doit, which calls a reporter's methods."""

import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from doit.exceptions import BaseFail, TaskFailed, UnmetDependency

from schemas.copy import Copied
from schemas.perms import Permitted
from schemas.scan import Change, Scanned
from schemas.undo import Undone
from stages import runs as run_folders
from stages.pipeline import STAGES
from stages.request import check_words, number
from stages.session import Session


class Reporter:
    """Tells what happened on stderr; the list of changes, when it was asked for, on stdout."""

    def __init__(self, session: Session) -> None:
        """Report of the given session.

        go_on, discard: how the user calls stages of a given run, and drops changes.
        """
        self._session = session
        self.go_on = "doit {stages} run={run}"
        self.discard = "discard=yes"
        self._last = ""

    def initialize(self, _tasks: object, selected: list[str]) -> None:
        """Note which stages were asked for."""
        self._last = selected[-1] if selected else ""

    def get_status(self, task: Any) -> None:
        """Do nothing before a task is looked at."""

    def execute_task(self, task: Any) -> None:
        """Do nothing before a task is executed."""

    def add_success(self, task: Any) -> None:
        """Show what a stage found if it is the last of this call."""
        if task.name == self._last:
            self._show(task.name)

    def skip_uptodate(self, task: Any) -> None:
        """Show what a stage found earlier if it is the last of this call."""
        if task.name == self._last:
            self._show(task.name)

    def skip_ignore(self, task: Any) -> None:
        """Say that the user told doit to ignore the task."""
        _tell(f"{task.name} is ignored, as told by «doit ignore»")

    def add_failure(self, task: Any, fail: BaseFail) -> None:
        """Show failures that the session does not know of: those of doit and of this program itself."""
        if not isinstance(fail, TaskFailed | UnmetDependency):
            self._session.exit_status = self._session.exit_status or 1
            _tell(f"{task.name}: {fail.get_msg()}")

    def cleanup_error(self, fail: BaseFail) -> None:
        """Show that releasing failed."""
        self._session.exit_status = self._session.exit_status or 1
        _tell(fail.get_msg())

    def runtime_error(self, message: str) -> None:
        """Show an error of doit itself."""
        self._session.exit_status = self._session.exit_status or 2
        _tell(message)

    def teardown_task(self, task: Any) -> None:
        """Do nothing before a task's teardown."""

    def complete_run(self) -> None:
        """Show the errors last, and end with the session's exit status, which says more than doit's own."""
        for message in self._session.errors:
            _tell(message)
        if self._session.kept_run and run_folders.is_open(run_folders.runs_folder() / self._session.kept_run):
            _tell("\n".join(self._how_to_go_on(self._session.kept_run)))
        if self._session.exit_status:
            raise SystemExit(self._session.exit_status)

    def _how_to_go_on(self, run: str) -> Iterator[str]:
        for what, stages in (
            ("look:  ", "scan"),
            ("apply: ", "copy perms unmount cleanup"),
            ("drop:  ", f"cleanup {self.discard}"),
        ):
            yield f"{what}{self.go_on.format(stages=stages, run=run)}"

    def _show(self, stage: str) -> None:
        if stage not in STAGES and stage != "undo":
            return
        pipeline = self._session.pipeline
        if stage == "scan":
            sys.stdout.write("".join(f"{line}\n" for line in changes(pipeline.read("scan", Scanned))))
            sys.stdout.flush()
        elif stage in ("copy", "cleanup") and not self._session.errors:
            scanned, copied = pipeline.optional("scan", Scanned), pipeline.optional("copy", Copied)
            if scanned and copied:
                _tell(f"copied {counts(scanned)} (run {scanned.run})")
                for conflict in copied.conflicts:
                    _tell(f"conflict: {printable(conflict.path)} {conflict.reason}")
        if stage == "undo" and not self._session.errors:
            undone = pipeline.read("undo", Undone)
            _tell(f"{undone.direction} {len(undone.done)} edits of run {undone.run}; undo again takes that back")
        permitted = pipeline.optional("perms", Permitted) if stage in ("perms", "cleanup") else None
        for refused in permitted.refused if permitted else []:
            _tell(f"not carried over: {refused.what} of {printable(refused.path)}: {refused.reason}")


def runs(options: Mapping[str, str]) -> Iterator[str]:
    """Return the list of all runs as lines for people."""
    from stages import history

    check_words(options, set())
    for run in history.all_runs():
        numbers = f"+{run.added} ~{run.updated} -{run.removed}" if run.added is not None else ""
        age = _age((time.time_ns() - run.started_ns) / 1e9)
        command = printable(shlex.join(run.command))
        yield f"{run.run}  {age:>4}  {run.state:9}  {numbers:14}  {_size(run.space):>10}  {command}"


def prune(options: Mapping[str, str]) -> Iterator[str]:
    """Drop old runs and return what was done as lines for people."""
    from stages import history

    check_words(options, {"keep", "older"})
    yield from history.prune(keep=number(options, "keep", int), older=number(options, "older", float))


def gc(options: Mapping[str, str]) -> Iterator[str]:
    """Release what was left behind and return what was done as lines for people."""
    from stages import gc as leftovers

    check_words(options, set())
    yield from leftovers.gc() or ["nothing was left behind"]


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def changes(scanned: Scanned) -> Iterator[str]:
    """Return the changes as lines for people, root by root, with counts at the end."""
    for overlay, root in scanned.overlay_map.items():
        lines = list(_changes_in(scanned, overlay))
        if lines:
            yield f"{printable(root)}:"
            yield from lines
    yield f"{counts(scanned)} (run {scanned.run})"


def _changes_in(scanned: Scanned, overlay: str) -> Iterator[str]:
    def inside(items: Iterable[Change]) -> Iterator[Change]:
        return (item for item in items if item.overlay_path.startswith(f"{overlay}/"))

    for word, items in (("added", scanned.added), ("updated", scanned.updated), ("removed", scanned.removed)):
        for item in inside(items):
            name = printable(item.overlay_path.partition("/")[2]) + ("/" if item.kind == "folder" else "")
            what = _size(item.size) if item.kind == "file" else "" if item.kind == "folder" else item.kind
            yield f"  {word:8} {name}  {what}".rstrip()
    for change in scanned.permissions:
        if change.overlay_path.partition("/")[0] == overlay:
            name = printable(change.overlay_path.partition("/")[2] or ".")
            modes = f"{change.before.mode:04o} → {change.after.mode:04o}"
            yield f"  {'mode':8} {name}  {modes if change.before.mode != change.after.mode else 'owner, ACL or xattrs'}"


def counts(scanned: Scanned) -> str:
    """Return the numbers of changes in words."""
    text = f"{len(scanned.added)} added, {len(scanned.updated)} updated, {len(scanned.removed)} removed"
    return f"{text}, {len(scanned.permissions)} with other permissions" if scanned.permissions else text


def printable(name: str) -> str:
    """Return a name as it can be shown on a terminal: control characters and bytes that are not UTF-8 escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else _escape(c) for c in name)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _size(size: int) -> str:
    number = float(size)
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _tell(message: str) -> None:
    # Not sys.stderr, which doit exchanges while a task runs.
    lines = "".join(f"acetate: {line}\n" for line in message.splitlines())
    os.write(2, lines.encode("utf-8", "backslashreplace"))
