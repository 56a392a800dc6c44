"""Take the steps of a plan: every step is one exchange of two names, atomic and the same in either direction.

Renaming takes one mount. Where a root is on another one than the run folder, the new files are first copied to a
staging folder in the root, from which they can be exchanged; afterwards the originals are copied to the run folder and
the staging folder is removed.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import attrs

from schemas.copy import Conflict, Done, Plan, Step
from schemas.prepare import Prepared
from schemas.scan import FolderTimes
from stages.linux import clock, copying, edits, files, layer

Record = Callable[[Plan], None]
OnConflict = Literal["stop", "skip", "overwrite"]


class Interfered(Exception):  # noqa: N818 - an event, told to the caller of `apply` as a conflict
    """Somebody changed a path between the plan and its edit."""

    def __init__(self, path: str) -> None:
        """Keep the path."""
        super().__init__(path)
        self.conflict = Conflict(path=path, reason="was changed during the copy")


def apply(prepared: Prepared, plan: Plan, record: Record, *, store: str, on_conflict: OnConflict) -> Plan:
    """Take every step of the plan that was not taken yet, then set the times of the folders above.

    record: writes the plan down again when all is ready for the first edit of the live tree.
    store: the folder with the other side of each step, by overlay path.
    on_conflict: what to do when somebody changed a path after the plan was made.

    Returns the plan as it was carried out: with the conflicts met, and without the steps that they kept from being
    taken. Raises Interfered when on_conflict is "stop": then all steps are taken back. OSError.
    """
    with _opened(prepared, plan, store) as trees:
        if not plan.ready:
            trees.unescape_xattrs(plan.escaped, plan.xattr_prefix)
            plan = trees.bring(plan)
            trees.link(plan)
            ready_ns = {root.overlay: clock.newest_stamp(root.path) for root in prepared.roots}
            plan = attrs.evolve(plan, ready=True, ready_ns=ready_ns)
            record(plan)
        met = _take_all(trees, plan, on_conflict)
        for index, step in enumerate(plan.steps):
            trees.put_away(index, step)
        for overlay in plan.staged:
            trees.remove_staging(overlay)
        for times in plan.folders:
            trees.set_times(times)
    paths = {conflict.path for conflict in met}
    if not paths or on_conflict == "overwrite":
        return plan
    steps = [step for step in plan.steps if step.path not in paths]
    return attrs.evolve(plan, steps=steps, conflicts=[*plan.conflicts, *met])


def done(plan: Plan) -> list[Done]:
    """Return what the steps of a plan do, for people."""
    return [
        Done(
            path=step.path,
            action="added" if not step.old_inode else "replaced" if step.new_inode else "removed",
            original=step.overlay_path if step.old_inode else None,
        )
        for step in plan.steps
    ]


def _take_all(trees: "_Trees", plan: Plan, on_conflict: OnConflict) -> list[Conflict]:
    met = []
    for index, step in enumerate(plan.steps):
        try:
            trees.take(index, step, plan.checked_ns, overwrite=on_conflict == "overwrite")
        except Interfered as error:
            met.append(error.conflict)
            if on_conflict == "stop":
                for number, taken in reversed(list(enumerate(plan.steps[:index]))):
                    trees.take_back(number, taken)
                for overlay in plan.staged:
                    trees.remove_staging(overlay)
                raise
    return met


@contextlib.contextmanager
def _opened(prepared: Prepared, plan: Plan, store: str) -> Iterator["_Trees"]:
    with contextlib.ExitStack() as stack:
        roots = {root.overlay: root.path for root in prepared.roots}
        live = {overlay: stack.enter_context(edits.Folders(path)) for overlay, path in roots.items()}
        folders = stack.enter_context(edits.Folders(store))
        yield _Trees(run=prepared.run, staged=plan.staged, live=live, store=folders)


@attrs.frozen(kw_only=True)
class _Trees:
    """The live trees and the store, which is the upper layer, by folder descriptors."""

    run: str
    staged: list[str]
    live: dict[str, edits.Folders]
    store: edits.Folders
    copier: copying.Copier = attrs.field(factory=lambda: copying.Copier(lambda name: name))

    def live_place(self, step: Step) -> tuple[int, str]:
        overlay, _, relative = step.overlay_path.partition("/")
        parent, _, name = relative.rpartition("/")
        return self.live[overlay].open(parent), name

    def store_place(self, step: Step) -> tuple[int, str]:
        parent, _, name = step.overlay_path.rpartition("/")
        return self.store.open(parent), name

    def is_staged(self, step: Step) -> bool:
        return step.overlay_path.partition("/")[0] in self.staged

    @contextlib.contextmanager
    def slot(self, index: int, step: Step) -> Iterator[tuple[int, str]]:
        """Open the folder in which the other side of a step is, and give its name there."""
        if not self.is_staged(step):
            yield self.store_place(step)
            return
        with self.staging(step.overlay_path.partition("/")[0]) as staging:
            yield staging, str(index)

    @contextlib.contextmanager
    def staging(self, overlay: str) -> Iterator[int]:
        """Open the staging folder of a root; make it if there is none."""
        root = self.live[overlay].open("")
        name = f".acetate-{self.run}"
        if files.lstat(root, name) is None:
            os.mkdir(name, 0o700, dir_fd=root)
        staging = files.open_folder(root, name)
        try:
            yield staging
        finally:
            os.close(staging)

    def bring(self, plan: Plan) -> Plan:
        """Copy the new files to the staging folders; return the plan with the inode numbers they have there."""
        steps = []
        for index, step in enumerate(plan.steps):
            inode = step.new_inode
            if inode and self.is_staged(step):
                with self.slot(index, step) as (staging, name):
                    edits.remove_tree(staging, name)
                    self.copier.copy(*self.store_place(step), staging, name)
                    inode = os.stat(name, dir_fd=staging, follow_symlinks=False).st_ino
            steps.append(attrs.evolve(step, new_inode=inode))
        return attrs.evolve(plan, steps=steps)

    def unescape_xattrs(self, overlay_paths: list[str], prefix: str) -> None:
        """Give xattrs that the command set under the overlay's prefix their real names."""
        for overlay_path in overlay_paths:
            parent, _, name = overlay_path.rpartition("/")
            path = files.entry_path(self.store.open(parent), name)
            for key in files.list_xattrs(path):
                real = layer.user_name(key, prefix)
                if real is not None and real != key:
                    os.setxattr(path, real, os.getxattr(path, key, follow_symlinks=False), follow_symlinks=False)
                    os.removexattr(path, key, follow_symlinks=False)

    def link(self, plan: Plan) -> None:
        """Replace new files that are to be further names of live files by links to those."""
        numbers = {step.overlay_path: index for index, step in enumerate(plan.steps)}
        for link in plan.links:
            overlay, _, relative = link.live.partition("/")
            parent, _, name = relative.rpartition("/")
            live = self.live[overlay].open(parent)
            with self.waiting_place(numbers, link.overlay_path) as (folder, waiting_name):
                times = os.fstat(folder)
                temporary = f".acetate-link-{numbers.get(link.overlay_path, 0)}"
                edits.remove_tree(folder, temporary)
                os.link(name, temporary, src_dir_fd=live, dst_dir_fd=folder, follow_symlinks=False)
                os.rename(temporary, waiting_name, src_dir_fd=folder, dst_dir_fd=folder)
                # rename(2) leaves two names of one file as they are.
                edits.remove_tree(folder, temporary)
                os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))

    @contextlib.contextmanager
    def waiting_place(self, numbers: dict[str, int], overlay_path: str) -> Iterator[tuple[int, str]]:
        """Open the folder in which a new file waits, which may be deep in that of a step, and give its name."""
        overlay, _, _ = overlay_path.partition("/")
        parent, _, name = overlay_path.rpartition("/")
        if overlay not in self.staged:
            yield self.store.open(parent), name
            return
        step = overlay_path
        inner: list[str] = []
        while step not in numbers:
            step, _, below = step.rpartition("/")
            inner.insert(0, below)
        with self.staging(overlay) as staging, contextlib.ExitStack() as stack:
            folder = staging
            *parents, name = [str(numbers[step]), *inner]
            for part in parents:
                folder = files.open_folder(folder, part)
                stack.callback(os.close, folder)
            yield folder, name

    def take(self, index: int, step: Step, checked_ns: Mapping[str, int], *, overwrite: bool) -> None:
        """Take a step if it was not taken before.

        Raises Interfered when the live side is not what the plan found there, unless it is to be overwritten.
        """
        try:
            live, name = self.live_place(step)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Interfered(step.path) from error
        status = files.lstat(live, name)
        inode = status.st_ino if status else 0
        if inode == step.new_inode:
            return
        if not overwrite and (inode != step.old_inode or (status and _is_changed(status, step))):
            raise Interfered(step.path)
        with self.slot(index, step) as (folder, slot_name):
            waiting = files.lstat(folder, slot_name)
            if waiting is not None and layer.is_whiteout_device(waiting):
                os.unlink(slot_name, dir_fd=folder)
            try:
                _swap(folder, slot_name, live, name, has_a=bool(step.new_inode), has_b=bool(inode))
            except (FileExistsError, FileNotFoundError) as error:
                raise Interfered(step.path) from error
            stamp = checked_ns[step.overlay_path.partition("/")[0]]
            if not overwrite and status and not _is_same(folder, slot_name, status, stamp):
                _swap(folder, slot_name, live, name, has_a=True, has_b=bool(step.new_inode))
                raise Interfered(step.path)

    def take_back(self, index: int, step: Step) -> None:
        """Take a step back if it was taken."""
        live, name = self.live_place(step)
        status = files.lstat(live, name)
        if (status.st_ino if status else 0) == step.new_inode:
            with self.slot(index, step) as (folder, slot_name):
                _swap(folder, slot_name, live, name, has_a=bool(step.old_inode), has_b=bool(step.new_inode))

    def set_times(self, times: FolderTimes) -> None:
        """Set the times of a live folder if it is still there."""
        overlay, _, relative = times.overlay_path.partition("/")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.utime(self.live[overlay].open(relative), ns=(times.atime_ns, times.mtime_ns))

    def put_away(self, index: int, step: Step) -> None:
        """Move an original from the staging folder to the store, in the place of the new file."""
        if not self.is_staged(step):
            return
        with self.slot(index, step) as (staging, staged_name):
            store, name = self.store_place(step)
            if not step.old_inode:
                edits.remove_tree(store, name)
            elif files.lstat(staging, staged_name) is not None:
                edits.remove_tree(store, name)
                self.copier.copy(staging, staged_name, store, name)
                edits.remove_tree(staging, staged_name)

    def remove_staging(self, overlay: str) -> None:
        edits.remove_tree(self.live[overlay].open(""), f".acetate-{self.run}")


def _is_changed(status: os.stat_result, step: Step) -> bool:
    """Return whether a live file was changed since the step was planned.

    Of files with several names the ctime tells nothing: earlier steps may have renamed or linked another name.
    """
    return status.st_ctime_ns != step.old_ctime_ns and (status.st_nlink == 1 or stat.S_ISDIR(status.st_mode))


def _is_same(folder: int, name: str, before: os.stat_result, stamp: int) -> bool:
    """Return whether what was just exchanged is what had been looked at before, unchanged since, with all below it.

    The exchange itself gives it a new ctime, but to nothing below it.
    """
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if (status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode) != (
        before.st_ino,
        before.st_mtime_ns,
        before.st_size,
        before.st_mode,
    ):
        return False
    return not stat.S_ISDIR(status.st_mode) or files.newest_change_below(folder, name) <= stamp


def _swap(folder_a: int, name_a: str, folder_b: int, name_b: str, *, has_a: bool, has_b: bool) -> None:
    """Let two names change places, of which one may be empty."""
    if has_a and has_b:
        edits.exchange(folder_a, name_a, folder_b, name_b)
    elif has_a:
        edits.move(folder_a, name_a, folder_b, name_b)
    elif has_b:
        edits.move(folder_b, name_b, folder_a, name_a)


def sync(folders: list[str]) -> None:
    """Write the file systems of the folders to disk. Raises OSError, also for writes that failed in the meantime."""
    for folder in folders:
        descriptor = os.open(folder, files.FOLDER_FLAGS)
        try:
            edits.sync_file_system(descriptor)
        finally:
            os.close(descriptor)


def shares_mount(folder_a: str, folder_b: str) -> bool:
    """Return whether files can be renamed from one folder to the other: rename(2) asks for the same mount."""
    return _mount_id(folder_a) == _mount_id(folder_b) and Path(folder_a).stat().st_dev == Path(folder_b).stat().st_dev


def _mount_id(folder: str) -> str:
    """Return the line of proc_pid_fdinfo(5) that names the mount that the folder is on."""
    descriptor = os.open(folder, files.FOLDER_FLAGS)
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    finally:
        os.close(descriptor)
    return next(line for line in lines if line.startswith("mnt_id:"))
