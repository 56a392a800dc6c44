"""The stages of a run as doit tasks."""

from collections.abc import Mapping
from typing import Any

from doit import doit_cmd, get_initial_workdir

from stages import report
from stages.session import Session


def _options() -> Mapping[str, str]:
    # get_var() gives single names only; a mistyped one has to be found too.
    return doit_cmd._CMDLINE_VARS or {}  # noqa: SLF001


SESSION = Session(_options, get_initial_workdir)
REPORTER = report.Reporter(SESSION)

DOIT_CONFIG = {
    "default_tasks": ["prepare", "mount", "execute", "scan", "copy", "perms", "unmount", "cleanup"],
    "continue": True,
    "reporter": REPORTER,
    # What is done is told by the manifests: doit's own database would be one more thing to keep true, and to lock.
    "backend": "sqlite3",
    "dep_file": ":memory:",
    "sort": "definition",
}


def task_prepare() -> dict[str, Any]:
    """Check the request and make the run folder; touches nothing else."""
    return SESSION.task("prepare", after=None)


def task_mount() -> dict[str, Any]:
    """Mount an overlay over each root, in a mount namespace of its own that stays until unmount."""
    return SESSION.task("mount", after="prepare")


def task_execute() -> dict[str, Any]:
    """Run the command in the sandbox: it can write to the overlays only."""
    return SESSION.task("execute", after="mount")


def task_scan() -> dict[str, Any]:
    """List what the command added, updated and removed; changes nothing."""
    return SESSION.task("scan", after="execute")


def task_copy() -> dict[str, Any]:
    """Copy the changes to the live tree; the originals are kept."""
    return SESSION.task("copy", after="scan")


def task_perms() -> dict[str, Any]:
    """Carry over permissions and times of what kept its content."""
    return SESSION.task("perms", after="copy")


def task_unmount() -> dict[str, Any]:
    """Release the mounts."""
    return SESSION.task("unmount", after="prepare")


def task_cleanup() -> dict[str, Any]:
    """Remove the overlay's folders; refuses to drop changes that were not copied, but for discard=yes."""
    return SESSION.task("cleanup", after="unmount")


def task_undo() -> dict[str, Any]:
    """Put the live tree back to before the copy of the newest run; once more: make the copy again."""
    return SESSION.task("undo", after=None)


def task_runs() -> dict[str, Any]:
    """List all runs with age, command, state, counts and the space they take."""
    return SESSION.verb(report.runs)


def task_prune() -> dict[str, Any]:
    """Drop old runs: all but the newest keep=N, or those from more than older=DAYS ago."""
    return SESSION.verb(report.prune)


def task_gc() -> dict[str, Any]:
    """Release what runs left behind whose process was killed."""
    return SESSION.verb(report.gc)
