"""Take the steps of a plan: every step is one exchange of two names, atomic and the same in either direction.

Renaming takes one mount. Where a root is on another one than the run folder, the new files are first copied to a
staging folder in the root, from which they can be exchanged; afterwards the originals are copied to the run folder and
the staging folder is removed.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from schemas.copy import Plan, Step
from schemas.prepare import Prepared
from stages.errors import ConflictError
from stages.linux import copying, edits, files, layer

Record = Callable[[Plan], None]


def apply(prepared: Prepared, plan: Plan, record: Record, *, xattr_prefix: str) -> None:
    """Take every step of the plan that was not taken yet, then set the times of the folders above.

    record: writes the plan down again when all is ready for the first edit of the live tree.
    xattr_prefix: that of the overlay's own xattrs.

    Raises ConflictError when somebody changed a path after the plan was made: then all steps are taken back. OSError.
    """
    with _opened(prepared, plan) as trees:
        if not plan.ready:
            trees.unescape_xattrs(plan.escaped, xattr_prefix)
            plan = trees.bring(plan)
            trees.link(plan)
            record(plan)
        _take_all(trees, plan.steps)
        for index, step in enumerate(plan.steps):
            trees.put_away(index, step)
        for overlay in plan.staged:
            trees.remove_staging(overlay)
        for times in plan.folders:
            overlay, _, relative = times.overlay_path.partition("/")
            os.utime(trees.live[overlay].open(relative), ns=(times.atime_ns, times.mtime_ns))


def _take_all(trees: "_Trees", steps: list[Step]) -> None:
    taken: list[tuple[int, Step]] = []
    try:
        for index, step in enumerate(steps):
            if trees.take(index, step):
                taken.append((index, step))
    except ConflictError:
        for index, step in reversed(taken):
            trees.take_back(index, step)
        raise


@contextlib.contextmanager
def _opened(prepared: Prepared, plan: Plan) -> Iterator["_Trees"]:
    with contextlib.ExitStack() as stack:
        roots = {root.overlay: root.path for root in prepared.roots}
        live = {overlay: stack.enter_context(edits.Folders(path)) for overlay, path in roots.items()}
        store = stack.enter_context(edits.Folders(prepared.base_path))
        yield _Trees(run=prepared.run, staged=plan.staged, live=live, store=store)


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
        return attrs.evolve(plan, steps=steps, ready=True)

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
        step, inner = overlay_path, []
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

    def take(self, index: int, step: Step) -> bool:
        """Take a step and return True, or False when it was taken before."""
        live, name = self.live_place(step)
        status = files.lstat(live, name)
        inode = status.st_ino if status else 0
        if inode == step.new_inode:
            return False
        if inode != step.old_inode:
            raise ConflictError(f"{step.path} was replaced by somebody else during the copy", self.run)
        with self.slot(index, step) as (folder, slot_name):
            waiting = files.lstat(folder, slot_name)
            if waiting is not None and layer.is_whiteout_device(waiting):
                os.unlink(slot_name, dir_fd=folder)
            _swap(folder, slot_name, live, name, has_a=bool(step.new_inode), has_b=bool(step.old_inode))
        return True

    def take_back(self, index: int, step: Step) -> None:
        live, name = self.live_place(step)
        with self.slot(index, step) as (folder, slot_name):
            _swap(folder, slot_name, live, name, has_a=bool(step.old_inode), has_b=bool(step.new_inode))

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


def _swap(folder_a: int, name_a: str, folder_b: int, name_b: str, *, has_a: bool, has_b: bool) -> None:
    """Let two names change places, of which one may be empty."""
    if has_a and has_b:
        edits.exchange(folder_a, name_a, folder_b, name_b)
    elif has_a:
        edits.move(folder_a, name_a, folder_b, name_b)
    elif has_b:
        edits.move(folder_b, name_b, folder_a, name_a)


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
