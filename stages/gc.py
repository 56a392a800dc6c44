"""gc: release what runs left behind whose process was killed."""

import os
import time
from pathlib import Path

from schemas import manifest
from schemas.mount import Mounted
from stages import runs
from stages.errors import AcetateError
from stages.linux import edits, files, namespaces
from stages.unmount import release

_BEING_MADE_SECONDS = 60


def gc() -> list[str]:
    """Release mounts and processes of runs that were broken off, and remove what is no whole run.

    Returns what was done, a line each. Raises AcetateError, OSError.
    """
    told = release_broken_off()
    for folder in runs.all_folders():
        young = time.time() - folder.stat().st_mtime < _BEING_MADE_SECONDS
        if not (folder / "manifests" / "prepare.json").exists() and not young:
            remove_folder(folder)
            told.append(f"removed {folder}, which was never prepared")
    for namespace, run_folder in namespaces.holders():
        if not Path(run_folder).exists():
            namespace.end()
            told.append(f"ended process {namespace.pid}, which held mounts of {run_folder}; that run is gone")
    return told


def release_broken_off() -> list[str]:
    """Release mounts and processes of the runs whose process was killed, and say so, a line each."""
    told = []
    for folder in runs.broken_off():
        try:
            descriptor = runs.lock(folder)
        except AcetateError:
            continue  # somebody else went on with it just now
        ended = release(str(folder), _mounted(folder))
        runs.unlock(descriptor)
        if ended:
            told.append(f"run {folder.name} was broken off; ended what it left: process {', '.join(map(str, ended))}")
    return told


def _mounted(folder: Path) -> Mounted | None:
    try:
        return manifest.read(folder / "manifests" / "mount.json", Mounted, folder.name)[0]
    except manifest.ManifestError:
        return None


def remove_folder(folder: Path) -> None:
    """Remove a run folder with all in it. Raises OSError."""
    parent = os.open(folder.parent, files.FOLDER_FLAGS)
    try:
        with files.deep_walks():
            edits.remove_tree(parent, folder.name)
    finally:
        os.close(parent)
