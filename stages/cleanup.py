"""cleanup: remove what only the run itself needed."""

import os
from pathlib import Path

from schemas.cleanup import Cleaned
from schemas.copy import Copied
from schemas.prepare import Prepared
from schemas.scan import Scanned
from stages.errors import UncopiedError
from stages.linux import edits, files


def cleanup(prepared: Prepared, scanned: Scanned | None, copied: Copied | None, *, discard: bool) -> Cleaned:
    """Remove upper, work and merged; keep what undo needs in a folder of its own.

    scanned, copied: what these stages left, if they ran. discard: drop changes that were not copied.

    Raises UncopiedError when there are such changes and discard is not set.
    """
    done = copied.done if copied and copied.complete else None
    if done is None and not discard and _holds_changes(prepared, scanned):
        raise UncopiedError(f"the changes of run {prepared.run} were not copied", prepared.run)
    folder = Path(prepared.run_folder)
    originals = folder / "originals"
    if done and not originals.exists():
        Path(prepared.base_path).rename(originals)
    run = os.open(folder, files.FOLDER_FLAGS)
    removed = [name for name in ("upper", "work", "merged") if (folder / name).exists()]
    try:
        with files.deep_walks():
            for name in removed:
                edits.remove_tree(run, name)
    finally:
        os.close(run)
    return Cleaned(
        schema="acetate/cleanup/1",
        run=prepared.run,
        removed=removed,
        discarded=done is None,
        originals=str(originals) if originals.exists() else None,
    )


def _holds_changes(prepared: Prepared, scanned: Scanned | None) -> bool:
    if scanned is not None:
        touched = any(item.before != item.after for item in scanned.untouched)
        return touched or any((scanned.added, scanned.updated, scanned.removed, scanned.permissions))
    return any(os.listdir(root.upper) for root in prepared.roots)
