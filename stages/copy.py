"""copy: apply the changeset to the live tree.

The new file and the live one change places in one system call; afterwards the upper layer holds the original. So no
file is ever missing or half written, nothing is copied where run folder and root share a file system, and the same
call leads back.
"""

import os
import stat
from pathlib import Path

import attrs

from schemas import checks, manifest
from schemas.copy import PLAN_FILE, Conflict, Copied, Plan, Step
from schemas.mount import Mounted
from schemas.prepare import Prepared
from schemas.scan import Change, FolderTimes, MetadataChange, Scanned
from stages import commit
from stages.errors import AcetateError
from stages.linux import clock, copying, edits, files, layer


def copy(prepared: Prepared, mounted: Mounted, scanned: Scanned) -> Copied:
    """Copy what the scan lists to the live tree and return what was done.

    Goes on where an earlier call was broken off. When somebody else changed a path of the changeset, nothing is copied
    (request.conflicts: stop), or all but that path (skip), or that path too (overwrite).

    Raises AcetateError, OSError.
    """
    plan_file = Path(prepared.run_folder, "manifests", PLAN_FILE)

    def record(plan: Plan) -> None:
        manifest.write(plan_file, plan)

    with files.deep_walks():
        if plan_file.exists():
            plan, _ = manifest.read(plan_file, Plan, prepared.run)
            checks.check(plan, prepared, str(plan_file))
        else:
            if prepared.request.sync:
                commit.sync([prepared.base_path])
            _complete_redirects(mounted, scanned)
            _complete_index_links(prepared, scanned)
            plan = _Planner(prepared, mounted, scanned).plan()
            if plan.conflicts and prepared.request.conflicts == "stop":
                return _copied(prepared, plan, complete=False)
            plan = attrs.evolve(plan, escaped=_clear_layer_xattrs(mounted, scanned))
            record(plan)
        policy = prepared.request.conflicts
        try:
            plan = commit.apply(prepared, plan, record, store=prepared.base_path, on_conflict=policy)
        except commit.Interfered as error:
            plan_file.unlink()
            plan = attrs.evolve(plan, conflicts=[*plan.conflicts, error.conflict])
            return _copied(prepared, plan, complete=False)
        record(plan)
        _drop_indexes(prepared)
        if prepared.request.sync:
            commit.sync([root.path for root in prepared.roots])
    return _copied(prepared, plan, complete=True)


def _drop_indexes(prepared: Prepared) -> None:
    """Remove the overlays' own links to files that are in the live tree now."""
    for root in prepared.roots:
        work = os.open(root.work, files.FOLDER_FLAGS)
        try:
            edits.remove_tree(work, "index")
        finally:
            os.close(work)


def _copied(prepared: Prepared, plan: Plan, *, complete: bool) -> Copied:
    return Copied(
        schema="acetate/copy/1",
        run=prepared.run,
        complete=complete,
        done=commit.done(plan) if complete else [],
        conflicts=plan.conflicts,
        originals=prepared.base_path,
        ended_ns={root.overlay: clock.newest_stamp(root.path) for root in prepared.roots},
    )


def _complete_redirects(mounted: Mounted, scanned: Scanned) -> None:
    """Bring into folders that were renamed in the overlay what of their content stands in the lower layer only."""
    prefix = mounted.xattr_prefix
    nested = {redirect.overlay_path for redirect in scanned.redirects}
    copier = copying.Copier(lambda name: None if name.startswith(prefix) else name)
    for redirect in scanned.redirects:
        upper = os.open(os.path.join(scanned.base_path, redirect.overlay_path), files.FOLDER_FLAGS)
        try:
            if layer.folder_marks(upper, prefix).redirect is None:
                continue
            lower = os.open(redirect.lower_path, files.FOLDER_FLAGS)
            try:
                _complete(copier, upper, lower, redirect.overlay_path, nested, prefix)
            finally:
                os.close(lower)
            os.setxattr(upper, prefix + "opaque", b"y")
            os.removexattr(upper, prefix + "redirect")
        finally:
            os.close(upper)


def _complete(copier: copying.Copier, upper: int, lower: int, overlay_path: str, nested: set[str], prefix: str) -> None:
    times = os.fstat(upper)
    for name in os.listdir(lower):
        status = files.lstat(upper, name)
        if status is None:
            copier.copy_whole(lower, name, upper)
        elif stat.S_ISDIR(status.st_mode) and f"{overlay_path}/{name}" not in nested:
            inner = files.open_folder(upper, name)
            try:
                below = files.lstat(lower, name)
                if below and stat.S_ISDIR(below.st_mode) and not layer.folder_marks(inner, prefix).opaque:
                    inner_lower = files.open_folder(lower, name)
                    try:
                        _complete(copier, inner, inner_lower, f"{overlay_path}/{name}", nested, prefix)
                    finally:
                        os.close(inner_lower)
                    os.setxattr(inner, prefix + "opaque", b"y")
            finally:
                os.close(inner)
    os.utime(upper, ns=(times.st_atime_ns, times.st_mtime_ns))


def _complete_index_links(prepared: Prepared, scanned: Scanned) -> None:
    """Put files that changed by way of another of their names into the upper layer under this name too."""
    roots = {root.overlay: root.path for root in prepared.roots}
    for link in scanned.index_links:
        overlay, _, relative = link.overlay_path.partition("/")
        parent, _, name = relative.rpartition("/")
        _make_upper_folders(os.path.join(prepared.base_path, overlay), roots[overlay], parent)
        with edits.Folders(os.path.join(prepared.base_path, overlay)) as upper:
            folder = upper.open(parent)
            times = os.fstat(folder)
            # In a folder that was renamed there may be a copy of the old content by now.
            edits.remove_tree(folder, name)
            os.link(link.index_path, name, dst_dir_fd=folder, follow_symlinks=False)
            os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))


def _make_upper_folders(upper_root: str, live_root: str, path: str) -> None:
    """Make the folders on a path in the upper layer that are in the live tree only, with their metadata."""
    copier = copying.Copier(lambda name: name)
    with edits.Folders(upper_root) as upper, edits.Folders(live_root) as live:
        done = ""
        for name in path.split("/") if path else []:
            folder = upper.open(done)
            if files.lstat(folder, name) is None:
                times = os.fstat(folder)
                os.mkdir(name, dir_fd=folder)
                copier.copy_metadata(live.open(done), name, folder, name)
                os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))
            done = f"{done}/{name}".lstrip("/")


def _clear_layer_xattrs(mounted: Mounted, scanned: Scanned) -> list[str]:
    """Take the overlay's own xattrs off what goes to the live tree; return the paths that have escaped ones."""
    prefix = mounted.xattr_prefix
    escaped = []
    with edits.Folders(scanned.base_path) as upper:
        for overlay_path in scanned.layer_xattrs:
            parent, _, name = overlay_path.rpartition("/")
            path = files.entry_path(upper.open(parent), name)
            names = {key: layer.user_name(key, prefix) for key in files.list_xattrs(path)}
            for key in [key for key, real in names.items() if real is None]:
                os.removexattr(path, key, follow_symlinks=False)
            if any(real not in (None, key) for key, real in names.items()):
                escaped.append(overlay_path)
    return escaped


class _Planner:
    """Finds the steps that lead from the live tree as it is to the one that the scan lists."""

    def __init__(self, prepared: Prepared, mounted: Mounted, scanned: Scanned) -> None:
        self.request = prepared.request
        self.run = prepared.run
        self.scanned = scanned
        self.baseline = mounted.baseline_ns
        self.removed = {change.path: change for change in scanned.removed}
        self.added = {change.path: change for change in scanned.added}
        self.link_targets = {link.overlay_path: link.live for link in scanned.hard_links}
        self.live = {root.overlay: edits.Folders(root.path) for root in prepared.roots}
        self.upper = edits.Folders(prepared.base_path)
        self.revived = set(scanned.revived)
        self.steps: list[Step] = []
        self.conflicts: list[Conflict] = []
        self.xattr_prefix = mounted.xattr_prefix
        self.checked_ns = {root.overlay: clock.newest_stamp(root.path) for root in prepared.roots}
        self.staged = [
            root.overlay for root in prepared.roots if not commit.shares_mount(root.path, prepared.base_path)
        ]

    def plan(self) -> Plan:
        try:
            for change in _outermost(self.scanned.removed):
                self.plan_removed(change)
            for change in [*self.scanned.updated, *self.scanned.relinked]:
                self.plan_updated(change)
            for change in _outermost(self.scanned.added):
                if change.path not in self.removed:
                    self.plan_added(change)
            for item in [*self.scanned.permissions, *self.scanned.untouched]:
                self.check_metadata(item)
            folders = [self.folder_times(times) for times in self.scanned.folders]
        finally:
            self.upper.close()
            for folders_of_root in self.live.values():
                folders_of_root.close()
        return Plan(
            schema="acetate/plan/1",
            direction="copied",
            run=self.run,
            steps=self.steps,
            folders=folders,
            conflicts=self.conflicts,
            checked_ns=self.checked_ns,
            xattr_prefix=self.xattr_prefix,
            escaped=[],
            links=self.scanned.hard_links,
            staged=self.staged,
        )

    def plan_removed(self, change: Change) -> None:
        """Plan the removal of a path with all below it, or its replacement by something of another kind."""
        replacement = self.added.get(change.path)
        folder, status = self.find(change.overlay_path)
        if status is None:
            if replacement is not None:
                self.conflict(change.path, "was removed", replacement, None)
            return
        reason = self.reason_changed(change, status) or self.reason_changed_below(change, folder, status)
        if reason:
            self.conflict(change.path, reason, replacement or change, status)
            return
        self.step(change, replacement, status)

    def plan_updated(self, change: Change) -> None:
        _, status = self.find(change.overlay_path)
        if status is None:
            self.conflict(change.path, "was removed", change, None)
            return
        reason = self.reason_changed(change, status)
        if not reason:
            self.step(change, change, status)
        elif not self.is_identical(change, status):
            self.conflict(change.path, reason, change, status)

    def plan_added(self, change: Change) -> None:
        folder, status = self.find(change.overlay_path)
        if status is None:
            if folder is None:
                self.conflict(change.path, "belongs in a folder that was removed or replaced", None, None)
            elif change.path in self.revived:
                self.conflict(change.path, "was removed", change, None)
            else:
                self.step(change, change, None)
        elif change.kind == "folder" and stat.S_ISDIR(status.st_mode):
            self.plan_added_inside(change)
        elif not self.is_identical(change, status):
            self.conflict(change.path, "was made by somebody else too", change, status)

    def plan_added_inside(self, folder: Change) -> None:
        """Plan what goes into a folder that somebody else made too."""
        start = folder.path + "/"
        below = [change for change in self.scanned.added if change.path.startswith(start)]
        for change in _outermost(below):
            self.plan_added(change)

    def find(self, overlay_path: str) -> tuple[int | None, os.stat_result | None]:
        """Return the live folder that a path is in and the status of what is there; None for what is missing."""
        overlay, _, relative = overlay_path.partition("/")
        parent, _, name = relative.rpartition("/")
        try:
            folder = self.live[overlay].open(parent)
        except (FileNotFoundError, NotADirectoryError):
            return None, None
        return folder, files.lstat(folder, name)

    def find_new(self, overlay_path: str) -> tuple[int, os.stat_result]:
        parent, _, name = overlay_path.rpartition("/")
        folder = self.upper.open(parent)
        status = files.lstat(folder, name)
        if status is None:
            raise AcetateError(f"{overlay_path} is in scan.json but not in the upper layer", "run the scan again")
        return folder, status

    def step(self, change: Change, new: Change | None, old: os.stat_result | None) -> None:
        new_inode = 0
        if new is not None:
            folder, status = self.find_new(new.overlay_path)
            if files.kind(status) != new.kind:
                raise AcetateError(f"{new.overlay_path} is no {new.kind} in the upper layer", "run the scan again")
            new_inode = self.inode_of_link(new.overlay_path) or status.st_ino
            if new.kind == "folder":
                self.check_whole(folder, new)
        self.steps.append(
            Step(
                path=change.path,
                overlay_path=change.overlay_path,
                new_inode=new_inode,
                old_inode=old.st_ino if old else 0,
                old_ctime_ns=old.st_ctime_ns if old else 0,
            )
        )

    def inode_of_link(self, overlay_path: str) -> int:
        """Return the inode number of the live file that a path becomes a name of, 0 if it becomes none."""
        if overlay_path not in self.link_targets:
            return 0
        _, status = self.find(self.link_targets[overlay_path])
        return status.st_ino if status else 0

    def check_whole(self, parent: int, change: Change) -> None:
        """See that a new folder in the upper layer holds just what the scan lists; whiteouts are dropped."""
        name = change.path.rpartition("/")[2]
        folder = files.open_folder(parent, name)
        try:
            for entry in list(os.scandir(folder)):
                path = f"{change.path}/{entry.name}"
                inner = self.added.get(path)
                if inner is None:
                    if not layer.is_whiteout_device(entry.stat(follow_symlinks=False)):
                        raise AcetateError(f"{path} is in the upper layer but not in scan.json", "run the scan again")
                    os.unlink(entry.name, dir_fd=folder)
                elif inner.kind == "folder":
                    self.check_whole(folder, inner)
        finally:
            os.close(folder)

    def reason_changed(self, change: Change, status: os.stat_result) -> str:
        if files.kind(status) != change.kind and change.path in self.removed:
            return "was replaced"
        if status.st_ino != change.live_inode:
            return "was replaced"
        baseline = self.baseline[change.overlay_path.partition("/")[0]]
        if status.st_ctime_ns != change.live_ctime_ns or status.st_ctime_ns > baseline:
            return "was changed"
        return ""

    def reason_changed_below(self, change: Change, parent: int | None, status: os.stat_result) -> str:
        """Return in which way what is below a folder to be removed is not as the scan lists it."""
        if parent is None or not stat.S_ISDIR(status.st_mode):
            return ""
        folder = files.open_folder(parent, change.path.rpartition("/")[2])
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = f"{change.path}/{entry.name}"
                    inner = self.removed.get(path)
                    if inner is None:
                        return f"{path} was added to it"
                    inner_status = entry.stat(follow_symlinks=False)
                    reason = self.reason_changed(inner, inner_status)
                    if reason:
                        return f"{path} {reason}"
                    reason = self.reason_changed_below(inner, folder, inner_status)
                    if reason:
                        return reason
        finally:
            os.close(folder)
        return ""

    def is_identical(self, change: Change, status: os.stat_result) -> bool:
        """Return whether somebody else made the very same change."""
        folder, new = self.find_new(change.overlay_path)
        live_folder, _ = self.find(change.overlay_path)
        assert live_folder is not None
        name = change.overlay_path.rpartition("/")[2]
        same = (new.st_mode, new.st_uid, new.st_gid) == (status.st_mode, status.st_uid, status.st_gid)
        if not same or (stat.S_ISREG(new.st_mode) and new.st_size != status.st_size):
            return False
        return files.same_content(folder, live_folder, name)

    def check_metadata(self, item: MetadataChange) -> None:
        """See that a path whose metadata is to be set is still what the scan saw."""
        if item.before == item.after:
            return
        _, status = self.find(item.overlay_path)
        if status is None or status.st_ino != item.live_inode:
            self.conflicts.append(Conflict(path=item.path, reason="was removed or replaced"))
            return
        baseline = self.baseline[item.overlay_path.partition("/")[0]]
        changed = status.st_ctime_ns != item.live_ctime_ns or status.st_ctime_ns > baseline
        now = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
        wanted = item.after.mode, item.after.uid, item.after.gid
        if changed and now != wanted and item in self.scanned.permissions:
            self.conflicts.append(Conflict(path=item.path, reason="was changed"))

    def folder_times(self, times: FolderTimes) -> FolderTimes:
        """Return the times that a folder is to get: those of somebody else's later change, if there was one."""
        _, status = self.find(times.overlay_path)
        baseline = self.baseline[times.overlay_path.partition("/")[0]]
        if status is None or status.st_mtime_ns <= baseline:
            return times
        return attrs.evolve(times, mtime_ns=max(times.mtime_ns, status.st_mtime_ns))

    def conflict(self, path: str, reason: str, new: Change | None, old: os.stat_result | None) -> None:
        """Note a conflict; plan the change nevertheless if that was asked for."""
        self.conflicts.append(Conflict(path=path, reason=reason))
        if self.request.conflicts == "overwrite" and new is not None:
            wanted = new if new.path in self.added or new.path not in self.removed else None
            self.step(new, wanted, old)


def _outermost(changes: list[Change]) -> list[Change]:
    """Return the changes that are in no folder that stands among them; they come in the order of a walk."""
    outermost = []
    inside = "\0"
    for change in changes:
        if not change.path.startswith(inside):
            outermost.append(change)
            inside = change.path + "/" if change.kind == "folder" else "\0"
    return outermost
