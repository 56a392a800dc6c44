"""The folders of the runs: where they are, how one is made, found and locked."""

import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path

from stages.errors import AcetateError, UsageError


def runs_folder() -> Path:
    """Return the folder that holds all run folders: ${XDG_CACHE_HOME:-~/.cache}/ollmchat."""
    # XDG Base Directory Specification: a relative path is to be ignored.
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    return Path(os.path.realpath(base / "ollmchat"))


def make_folder() -> Path:
    """Make a run folder that nobody else can enter, with its manifests folder, and return it.

    Its name holds the time in UTC to the microsecond, so that the names of runs sort by age.
    """
    parent = runs_folder()
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        folder = parent / datetime.now(UTC).strftime("overlay-%Y%m%d-%H%M%S-%f")
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        (folder / "manifests").mkdir()
        return folder


def all_folders() -> list[Path]:
    """Return the folders of all runs, the newest first."""
    try:
        names = os.listdir(runs_folder())
    except FileNotFoundError:
        return []
    return [runs_folder() / name for name in sorted(names, reverse=True) if name.startswith("overlay-")]


def is_open(folder: Path) -> bool:
    """Return whether a run was prepared and its changes are neither copied nor dropped for good."""
    manifests = folder / "manifests"
    return (manifests / "prepare.json").exists() and not (manifests / "cleanup.json").exists()


def newest_open() -> Path:
    """Return the folder of the newest open run. Raises UsageError when there is none."""
    for folder in all_folders():
        if is_open(folder):
            return folder
    raise UsageError("there is no open run to go on with", "begin one with cmd='SHELL COMMAND'")


def newest_copied() -> Path:
    """Return the folder of the newest run that began to copy its changes. Raises UsageError when there is none."""
    for folder in all_folders():
        if (folder / "manifests" / "copy.plan.json").exists():
            return folder
    raise UsageError("there is no run whose changes were copied", f"the runs are in {runs_folder()}")


def named(run: str) -> Path:
    """Return the folder of the run with the given id. Raises UsageError when there is none."""
    folder = runs_folder() / run
    if "/" in run or not run.startswith("overlay-") or not (folder / "manifests").is_dir():
        raise UsageError(f"there is no run {run!r}", f"the runs are the folders overlay-… in {runs_folder()}")
    return folder


def lock(folder: Path) -> int:
    """Lock a run for this process and return the descriptor that holds the lock until `unlock`.

    The lock file is not empty while a process works on the run: if it is not empty and not locked, that process was
    killed.

    Raises AcetateError when another process works on the run.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AcetateError(
            f"run {folder.name} is in use by another process", "wait until it is done, or name another run with run=ID"
        ) from None
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def unlock(descriptor: int) -> None:
    """Release the lock of a run whose work is done, or taken care of."""
    os.ftruncate(descriptor, 0)
    os.close(descriptor)


def broken_off() -> list[Path]:
    """Return the folders of the runs whose process was killed while it worked on them."""
    return [folder for folder in all_folders() if _is_marked(folder) and not _is_locked(folder)]


def _is_marked(folder: Path) -> bool:
    try:
        return (folder / "lock").stat().st_size > 0
    except FileNotFoundError:
        return False


def _is_locked(folder: Path) -> bool:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
