"""undo: put the live tree back to before the copy; the next undo makes the copy again.

The steps of a plan are exchanges, so the way back is the same steps in reverse.
"""

import os
import stat
from pathlib import Path

import attrs

from schemas import checks, manifest
from schemas.copy import PLAN_FILE, Conflict, Copied, Plan, Step
from schemas.perms import Permitted
from schemas.prepare import Metadata, Prepared
from schemas.scan import FolderTimes, MetadataChange, Scanned
from schemas.undo import UNDO_PLAN_FILE, Undone
from stages import commit
from stages.linux import clock, edits, files, metadata


def undo(
    prepared: Prepared, scanned: Scanned, copied: Copied | None, permitted: Permitted | None, earlier: Undone | None
) -> Undone:
    """Undo the copy of a run, or redo it if it was undone, and return what was done.

    copied, permitted: None when the stage was broken off. earlier: what the last undo left.

    What somebody changed since then is a conflict: then nothing is done (request.conflicts: stop), or all but that
    path (skip), or that path too (overwrite). Goes on where an earlier call was broken off.

    Raises OSError.
    """
    plan_file = Path(prepared.run_folder, "manifests", UNDO_PLAN_FILE)

    def record(plan: Plan) -> None:
        manifest.write(plan_file, plan)

    with files.deep_walks():
        last, last_digest = _last_plan(prepared)
        if last.direction != "copied" and (earlier is None or earlier.plan != last_digest):
            plan, items = last, _metadata_items(scanned)
        else:
            if last.staged and copied is None:
                # The way back begins where all originals are in the store.
                last = commit.apply(prepared, last, lambda _: None, store=_store(prepared), on_conflict="overwrite")
            planner = _Planner(prepared, last, _stamps(last, copied, permitted, earlier), finished=copied is not None)
            plan, items = planner.plan(_metadata_items(scanned))
            if plan.conflicts and prepared.request.conflicts == "stop":
                return _undone(prepared, plan, earlier.plan if earlier else "", complete=False)
            record(plan)
        try:
            plan = commit.apply(prepared, plan, record, store=_store(prepared), on_conflict=prepared.request.conflicts)
        except commit.Interfered as error:
            if last.direction == "copied":
                plan_file.unlink()
            else:
                record(last)
            plan = attrs.evolve(plan, conflicts=[*plan.conflicts, error.conflict])
            return _undone(prepared, plan, earlier.plan if earlier else "", complete=False)
        _set_all_metadata(prepared, items, forward=plan.direction == "redone")
        digest = manifest.write(plan_file, plan)
        if prepared.request.sync:
            commit.sync([root.path for root in prepared.roots])
    return _undone(prepared, plan, digest, complete=True)


def _undone(prepared: Prepared, plan: Plan, digest: str, *, complete: bool) -> Undone:
    ended_ns = {root.overlay: clock.newest_stamp(root.path) for root in prepared.roots}
    for root in prepared.roots:
        clock.wait_past(root.path, ended_ns[root.overlay])
    return Undone(
        schema="acetate/undo/1",
        run=prepared.run,
        direction="redone" if plan.direction == "redone" else "undone",
        complete=complete,
        plan=digest,
        done=commit.done(plan) if complete else [],
        conflicts=plan.conflicts,
        ended_ns=ended_ns,
    )


def _store(prepared: Prepared) -> str:
    """Return the folder with the other sides of the steps: the upper layer, which cleanup renames or removes."""
    originals = Path(prepared.run_folder, "originals")
    if Path(prepared.base_path).exists() and not originals.exists():
        return prepared.base_path
    for root in prepared.roots:
        (originals / root.overlay).mkdir(parents=True, exist_ok=True)
    return str(originals)


def _last_plan(prepared: Prepared) -> tuple[Plan, str]:
    manifests = Path(prepared.run_folder, "manifests")
    file = manifests / UNDO_PLAN_FILE
    if not file.exists():
        file = manifests / PLAN_FILE
    plan, digest = manifest.read(file, Plan, prepared.run)
    checks.check(plan, prepared, str(file))
    return plan, digest


def _stamps(last: Plan, copied: Copied | None, permitted: Permitted | None, earlier: Undone | None) -> dict[str, int]:
    """Return the newest ctime, by overlay, of what nobody changed since the last plan was carried out."""
    if last.direction != "copied" and earlier is not None:
        return earlier.ended_ns
    if permitted is not None:
        return permitted.ended_ns
    return copied.ended_ns if copied is not None else last.ready_ns


def _metadata_items(scanned: Scanned) -> list[MetadataChange]:
    """Return what perms carried over; not so what became another inode, which the steps bring back with its own."""
    relinked = {change.overlay_path for change in scanned.relinked}
    items = [*scanned.permissions, *scanned.untouched]
    return [item for item in items if item.before != item.after and item.overlay_path not in relinked]


def _set_all_metadata(prepared: Prepared, items: list[MetadataChange], *, forward: bool) -> None:
    live = {root.overlay: edits.Folders(root.path) for root in prepared.roots}
    try:
        # A folder's mode may keep its owner from what is in it: the innermost first.
        for item in reversed(items):
            overlay, _, relative = item.overlay_path.partition("/")
            parent, _, name = relative.rpartition("/")
            was, wanted = (item.before, item.after) if forward else (item.after, item.before)
            metadata.set_metadata(live[overlay].open(parent), name or ".", was, wanted)
    finally:
        for folders in live.values():
            folders.close()


class _Planner:
    """Finds the way back from what a plan led to, and what somebody changed since."""

    def __init__(self, prepared: Prepared, last: Plan, stamps: dict[str, int], *, finished: bool) -> None:
        self.prepared = prepared
        self.last = last
        self.stamps = stamps
        self.finished = finished
        self.policy = prepared.request.conflicts
        self.live = {root.overlay: edits.Folders(root.path) for root in prepared.roots}
        self.conflicts: list[Conflict] = []

    def plan(self, items: list[MetadataChange]) -> tuple[Plan, list[MetadataChange]]:
        """Return the plan of the way back, and the items whose metadata is to be set back."""
        forward = self.last.direction == "undone"
        checked_ns = {root.overlay: clock.newest_stamp(root.path) for root in self.prepared.roots}
        try:
            steps = [inverse for step in reversed(self.last.steps) if (inverse := self.inverse(step))]
            kept = [item for item in items if self.may_be_set(item, forward=forward)]
            folders = [self.inverse_times(times) for times in self.last.folders]
        finally:
            for folders_of_root in self.live.values():
                folders_of_root.close()
        plan = attrs.evolve(
            self.last,
            direction="redone" if forward else "undone",
            steps=steps,
            folders=folders,
            conflicts=self.conflicts,
            checked_ns=checked_ns,
            escaped=[],
            links=[],
            ready=False,
        )
        return plan, kept

    def find(self, overlay_path: str) -> tuple[int | None, str, os.stat_result | None]:
        overlay, _, relative = overlay_path.partition("/")
        parent, _, name = relative.rpartition("/")
        try:
            folder = self.live[overlay].open(parent)
        except (FileNotFoundError, NotADirectoryError):
            return None, name, None
        return folder, name or ".", files.lstat(folder, name or ".")

    def inverse(self, step: Step) -> Step | None:
        """Return the step that takes a step back, None if it was not taken or is to be left alone."""
        folder, name, status = self.find(step.overlay_path)
        inode = status.st_ino if status else 0
        if inode == step.old_inode:
            return None
        stamp = self.stamps.get(step.overlay_path.partition("/")[0], 0)
        reason = ""
        if inode != step.new_inode:
            reason = "was removed" if status is None else "was replaced"
        elif status and folder is not None and self.is_changed(folder, name, status, stamp):
            reason = "was changed"
        if reason:
            self.conflicts.append(Conflict(path=step.path, reason=f"{reason} since then"))
            if self.policy == "skip" or folder is None:
                return None
        return attrs.evolve(
            step, new_inode=step.old_inode, old_inode=inode, old_ctime_ns=status.st_ctime_ns if status else 0
        )

    def is_changed(self, folder: int, name: str, status: os.stat_result, stamp: int) -> bool:
        # Of a copy that was broken off, the exchange itself gave the path its ctime.
        if stat.S_ISDIR(status.st_mode):
            return (self.finished and status.st_ctime_ns > stamp) or files.newest_change_below(folder, name) > stamp
        return self.finished and status.st_nlink == 1 and status.st_ctime_ns > stamp

    def may_be_set(self, item: MetadataChange, *, forward: bool) -> bool:
        """Return whether the metadata of a path is to be set back."""
        folder, name, status = self.find(item.overlay_path)
        was, wanted = (item.before, item.after) if forward else (item.after, item.before)
        if status is None or folder is None or status.st_ino != item.live_inode:
            self.conflicts.append(Conflict(path=item.path, reason="was removed or replaced since then"))
            return False
        now = _metadata(folder, name, status)
        if _same(now, wanted):
            return True
        stamp = self.stamps.get(item.overlay_path.partition("/")[0], 0)
        file_changed = status.st_nlink == 1 and self.finished and status.st_ctime_ns > stamp
        if not _same(now, was) or (file_changed and not stat.S_ISDIR(status.st_mode)):
            self.conflicts.append(Conflict(path=item.path, reason="was changed since then"))
            return self.policy == "overwrite"
        return True

    def inverse_times(self, times: FolderTimes) -> FolderTimes:
        _, _, status = self.find(times.overlay_path)
        stamp = self.stamps.get(times.overlay_path.partition("/")[0], 0)
        mtime_ns = times.before_mtime_ns
        if status is not None and self.finished and status.st_mtime_ns > stamp:
            mtime_ns = max(mtime_ns, status.st_mtime_ns)
        return attrs.evolve(
            times,
            atime_ns=times.before_atime_ns,
            mtime_ns=mtime_ns,
            before_atime_ns=times.atime_ns,
            before_mtime_ns=times.mtime_ns,
        )


def _same(a: Metadata, b: Metadata) -> bool:
    """Return whether permissions and the like are the same; times aside."""
    return (a.mode, a.uid, a.gid, a.xattrs) == (b.mode, b.uid, b.gid, b.xattrs)


def _metadata(folder: int, name: str, status: os.stat_result) -> Metadata:
    return Metadata(
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        atime_ns=status.st_atime_ns,
        mtime_ns=status.st_mtime_ns,
        xattrs=files.xattrs(folder, name),
    )
