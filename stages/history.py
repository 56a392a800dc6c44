"""runs and prune: what runs there are, and dropping old ones."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

from schemas import manifest
from schemas.cleanup import Cleaned
from schemas.copy import Copied
from schemas.execute import Executed
from schemas.manifest import Manifest
from schemas.prepare import Prepared
from schemas.scan import Scanned
from schemas.undo import Undone
from stages import runs
from stages.errors import AcetateError, UsageError
from stages.gc import remove_folder
from stages.linux import files
from stages.unmount import release


@attrs.frozen(kw_only=True)
class Run:
    """A run as the list of runs shows it.

    state: how far it got. added, updated, removed: numbers of changes, None before the scan.
    space: bytes that its folder takes on disk.
    """

    run: str
    started_ns: int
    command: list[str]
    state: str
    is_open: bool
    added: int | None
    updated: int | None
    removed: int | None
    space: int


def all_runs() -> Iterator[Run]:
    """Return all runs that were prepared, the newest first."""
    for folder in runs.all_folders():
        prepared = _read(folder, "prepare", Prepared)
        if isinstance(prepared, Prepared):
            scanned = _read(folder, "scan", Scanned)
            lists = (scanned.added, scanned.updated, scanned.removed) if isinstance(scanned, Scanned) else None
            added, updated, removed = map(len, lists) if lists else (None, None, None)
            yield Run(
                run=folder.name,
                started_ns=prepared.started_ns,
                command=prepared.request.argv,
                state=_state(folder),
                is_open=runs.is_open(folder),
                added=added,
                updated=updated,
                removed=removed,
                space=files.space(str(folder)),
            )


def _read(folder: Path, stage: str, kind: type[Manifest]) -> Manifest | None:
    with contextlib.suppress(manifest.ManifestError):
        return manifest.read(folder / "manifests" / f"{stage}.json", kind, folder.name)[0]
    return None


def _state(folder: Path) -> str:
    undone = _read(folder, "undo", Undone)
    copied, cleaned = _read(folder, "copy", Copied), _read(folder, "cleanup", Cleaned)
    if isinstance(undone, Undone) and undone.complete:
        return undone.direction
    if isinstance(cleaned, Cleaned) and cleaned.discarded:
        return "dropped"
    if isinstance(copied, Copied):
        return "copied" if copied.complete else "conflicts"
    if (folder / "manifests" / "copy.plan.json").exists():
        return "copying"
    executed = _read(folder, "execute", Executed)
    if isinstance(executed, Executed) and executed.exit_status:
        return "failed"
    for stage in ("scan", "execute", "mount"):
        if (folder / "manifests" / f"{stage}.json").exists():
            return {"scan": "scanned", "execute": "executed", "mount": "mounted"}[stage]
    return "prepared"


def prune(*, keep: int | None, older: float | None) -> list[str]:
    """Drop runs, with what undo needs of them, and return what was done, a line each.

    keep: the newest so many stay. older: only runs that began more than so many days ago go. At least one is needed.
    Runs whose changes were neither copied nor dropped stay, and are named.

    Raises UsageError, AcetateError, OSError.
    """
    if keep is None and older is None:
        raise UsageError("prune needs to know what to drop", "say keep=N, older=DAYS or both")
    told = []
    for number, run in enumerate(all_runs()):
        age_days = (time.time_ns() - run.started_ns) / 86_400e9
        if (keep is not None and number < keep) or (older is not None and age_days <= older):
            continue
        told.append(_drop(runs.named(run.run), run))
    return told


def _drop(folder: Path, run: Run) -> str:
    if run.is_open:
        return f"kept {run.run}: its changes were neither copied nor dropped"
    try:
        descriptor = runs.lock(folder)
    except AcetateError as error:
        return f"kept {run.run}: {error.args[0]}"
    try:
        release(str(folder), None)
        remove_folder(folder)
    finally:
        runs.unlock(descriptor)
    return f"dropped {run.run}: {' '.join(run.command)}"
