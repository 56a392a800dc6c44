"""scan: read the upper layers and list what the command added, updated and removed."""

import contextlib
import os
import stat
from collections.abc import Callable
from typing import Literal, NamedTuple

import attrs

from schemas.mount import Mounted
from schemas.prepare import Metadata, Prepared, RootFolder
from schemas.scan import Change, FolderTimes, HardLink, IndexLink, MetadataChange, Redirect, Scanned
from stages.errors import AcetateError
from stages.linux import edits, files, layer


def scan(prepared: Prepared, mounted: Mounted) -> Scanned:
    """Return the changeset of a run; the live tree is read only where a changed path stands in it.

    Raises AcetateError for anything in an upper layer that is not understood, OSError for what can't be read.
    """
    scanned = Scanned(
        schema="acetate/scan/1", run=prepared.run, base_path=prepared.base_path, overlay_map=prepared.overlay_map
    )
    with files.deep_walks():
        for root in prepared.roots:
            _Scan(scanned, root, mounted.xattr_prefix, mounted.baseline_ns[root.overlay]).root()
    return scanned


_Opener = Callable[[int, str], int]


class _Place(NamedTuple):
    """A folder in the merged view: its path, and its descriptors in the upper layer, the lower one and the live tree.

    lower is what shows through the upper folder. It is the live folder itself (the same descriptor) unless the folder
    was renamed in the overlay; None when nothing shows through.
    """

    path: str
    overlay_path: str
    upper: int | None
    lower: int | None
    live: int | None
    marks: layer.FolderMarks | None


class _Entry(NamedTuple):
    """A name in the merged view, and which folder holds what stands there, under which name.

    layer: index for a lower name of a file that was changed by way of another of its names.
    """

    name: str
    status: os.stat_result
    folder: int
    source: str
    layer: Literal["upper", "index", "lower"]


class _Name(NamedTuple):
    """One name of a file of several names in the upper layer.

    live: the live file there if it stays, as its content did not change; None for a name that was added or updated.
    """

    path: str
    overlay_path: str
    status: os.stat_result
    live: os.stat_result | None


@attrs.define
class _Scan:
    """The scan of one root."""

    scanned: Scanned
    root_folder: RootFolder
    prefix: str
    baseline_ns: int
    lower_root: int = -1
    index: dict[int, str] = attrs.field(factory=dict)
    index_folder: int = -1
    suspects: list[tuple[str, bytes]] = attrs.field(factory=list)
    names: dict[tuple[str, int], list[_Name]] = attrs.field(factory=dict)

    def root(self) -> None:
        with contextlib.ExitStack() as stack:

            def opened(path: str) -> int:
                descriptor = os.open(path, files.FOLDER_FLAGS)
                stack.callback(os.close, descriptor)
                return descriptor

            upper, live = opened(self.root_folder.upper), opened(self.root_folder.path)
            self.lower_root = live
            if layer.keeps_links(self.prefix) and layer.index_files(self.root_folder.work):
                self.index_folder = opened(layer.index_folder(self.root_folder.work))
                self.read_index()
            marks = self.marks(upper, self.root_folder.overlay)
            place = _Place(self.root_folder.path, self.root_folder.overlay, upper, live, live, marks)
            self.root_metadata(upper, live)
            self.folder(place)
            if self.index or any(kind == "lower" for kind, _ in self.names):
                self.partners_in(place)
            self.group_names()
            self.find_revived()

    def read_index(self) -> None:
        """Find which lower files were changed by way of any of their names."""
        for name in layer.index_files(self.root_folder.work):
            inode = layer.lower_inode(name, self.lower_root)
            if inode is not None:
                self.index[inode] = name

    def root_metadata(self, upper: int, live: int) -> None:
        """Compare the upper root with what prepare made of it: not all of the live root could be given to it."""
        overlay, path = self.root_folder.overlay, self.root_folder.path
        before, after = self.root_folder.twin, self.layer_metadata(upper, ".", os.fstat(upper))
        status = os.fstat(live)
        self.metadata(path, overlay, status, before, after)
        self.folder_times(path, overlay, status, after)

    def folder(self, place: _Place) -> None:
        """List the changes below a folder of the merged view that is a folder in the live tree too, or below None."""
        shown = self.shown(place)
        for name in sorted({*shown, *self.hidden(place, shown)}):
            entry = shown.get(name)
            status = files.lstat(place.live, name)
            path, overlay_path = f"{place.path}/{name}", f"{place.overlay_path}/{name}"
            if entry is None:
                if status is not None:
                    self.removed(path, overlay_path, place.live, name, status)
                continue
            if status is not None and files.kind(status) != files.kind(entry.status):
                self.removed(path, overlay_path, place.live, name, status)
                status = None
            if stat.S_ISDIR(entry.status.st_mode):
                self.shown_folder(place, entry, path, overlay_path, status)
            elif status is None:
                self.added(place, path, overlay_path, entry)
            else:
                self.compare(place, entry, path, overlay_path, status)

    def shown(self, place: _Place) -> dict[str, _Entry]:
        """Return what the merged view shows in a folder, by name; of what only the live folder holds, nothing."""
        shown: dict[str, _Entry] = {}
        whiteouts: set[str] = set()
        if place.upper is not None:
            with os.scandir(place.upper) as entries:
                for found in entries:
                    status = found.stat(follow_symlinks=False)
                    if self.is_whiteout(place, found.name, status):
                        whiteouts.add(found.name)
                    else:
                        shown[found.name] = _Entry(found.name, status, place.upper, found.name, "upper")
        if place.lower is not None and place.lower != place.live:
            with os.scandir(place.lower) as entries:
                for found in entries:
                    if found.name not in shown and found.name not in whiteouts:
                        shown[found.name] = self.lower_entry(place.lower, found)
        return shown

    def lower_entry(self, lower: int, found: "os.DirEntry[str]") -> _Entry:
        """Return what the merged view shows of an entry of the lower layer."""
        index_name = self.index.get(found.inode())
        if index_name is None:
            return _Entry(found.name, found.stat(follow_symlinks=False), lower, found.name, "lower")
        status = os.stat(index_name, dir_fd=self.index_folder, follow_symlinks=False)
        return _Entry(found.name, status, self.index_folder, index_name, "index")

    def hidden(self, place: _Place, shown: dict[str, _Entry]) -> list[str]:
        """Return names that the live folder may hold and the merged view does not show."""
        if place.live is None:
            return []
        if place.lower != place.live:
            return [name for name in os.listdir(place.live) if name not in shown]
        assert place.upper is not None
        return [name for name in os.listdir(place.upper) if name not in shown]

    def find_revived(self) -> None:
        """List the added files that are copies of lower files which the command did not rename."""
        if not self.suspects:
            return
        renamed = set()
        with edits.Folders(self.root_folder.path) as live:
            for change in self.scanned.removed:
                overlay, _, relative = change.overlay_path.partition("/")
                if overlay == self.root_folder.overlay:
                    parent, _, name = relative.rpartition("/")
                    renamed.add(layer.handle(live.open(parent), name))
        self.scanned.revived.extend(path for path, origin in self.suspects if origin not in renamed)

    def is_whiteout(self, place: _Place, name: str, status: os.stat_result) -> bool:
        if layer.is_whiteout_device(status):
            return True
        if place.marks is None or not place.marks.xattr_whiteouts or place.upper is None:
            return False
        return layer.is_xattr_whiteout(files.entry_path(place.upper, name), status, self.prefix)

    def shown_folder(
        self, place: _Place, entry: _Entry, path: str, overlay_path: str, live_status: os.stat_result | None
    ) -> None:
        """List a folder of the merged view and what changed below it."""
        descriptors: list[int] = []

        def opened(parent: int, name: str) -> int:
            descriptors.append(files.open_folder(parent, name))
            return descriptors[-1]

        try:
            live = opened(place.live, entry.name) if live_status and place.live is not None else None
            if entry.layer == "upper":
                upper = opened(entry.folder, entry.name)
                marks = self.marks(upper, overlay_path)
                lower = self.lower_of(place, entry.name, marks, live, overlay_path, opened)
                inner = _Place(path, overlay_path, upper, lower, live, marks)
            else:
                inner = _Place(path, overlay_path, None, opened(entry.folder, entry.name), live, None)
            if live_status is None:
                self.added(place, path, overlay_path, entry)
            else:
                self.compare(place, entry, path, overlay_path, live_status)
            self.folder(inner)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def lower_of(
        self, place: _Place, name: str, marks: layer.FolderMarks, live: int | None, overlay_path: str, opened: _Opener
    ) -> int | None:
        """Return the folder of the lower layer that shows through an upper folder, None if none does."""
        if marks.redirect is None:
            if marks.opaque or place.lower is None:
                return None
            if place.lower == place.live:
                return live
            status = files.lstat(place.lower, name)
            return opened(place.lower, name) if status and stat.S_ISDIR(status.st_mode) else None
        if marks.redirect.startswith("/"):
            lower = self.lower_root
            names = [part for part in marks.redirect.split("/") if part]
            lower_path = self.root_folder.path + marks.redirect
        else:
            if place.lower is None:
                raise AcetateError(f"{overlay_path}: renamed from {marks.redirect!r} in no folder of the lower layer")
            lower = place.lower
            names = [marks.redirect]
            lower_path = os.readlink(f"/proc/self/fd/{place.lower}") + "/" + marks.redirect
        for part in names:
            lower = opened(lower, part)
        self.scanned.redirects.append(Redirect(overlay_path=overlay_path, lower_path=lower_path))
        return lower

    def compare(self, place: _Place, entry: _Entry, path: str, overlay_path: str, status: os.stat_result) -> None:
        """List a path that is of one kind in the merged view and in the live tree."""
        assert place.live is not None
        if not stat.S_ISDIR(status.st_mode):
            self.note_layer_xattrs(entry, overlay_path)
            if not self.same_content(place.live, entry, status):
                self.updated(path, overlay_path, entry, status)
                return
            if self.is_replaced(place.live, entry, status):
                self.scanned.relinked.append(self.change(path, overlay_path, entry.status, status))
                self.note_name(path, overlay_path, entry, None)
            else:
                self.note_name(path, overlay_path, entry, status)
        before = self.live_metadata(place.live, entry.name, status)
        after = self.entry_metadata(entry)
        self.metadata(path, overlay_path, status, before, after)
        if stat.S_ISDIR(status.st_mode):
            self.folder_times(path, overlay_path, status, after)

    def same_content(self, live: int, entry: _Entry, status: os.stat_result) -> bool:
        if entry.status.st_size != status.st_size and not stat.S_ISFIFO(status.st_mode):
            return False
        return files.same_content(entry.folder, live, entry.source, entry.name)

    def is_replaced(self, live: int, entry: _Entry, status: os.stat_result) -> bool:
        """Return whether a file of the same content as the live one is another file, and that can be seen by its links.

        In a user namespace a file of several names has no mark when it is copied up, so this can't be told there.
        """
        if entry.layer == "index" or (entry.status.st_nlink == 1 and status.st_nlink == 1):
            return False
        if entry.layer == "lower":
            return entry.status.st_ino != status.st_ino
        if status.st_nlink > 1 and not layer.keeps_links(self.prefix):
            return False
        return layer.origin(files.entry_path(entry.folder, entry.source), self.prefix) != layer.handle(live, entry.name)

    def added(self, place: _Place, path: str, overlay_path: str, entry: _Entry) -> None:
        if place.live is not None and entry.layer != "lower" and os.fstat(place.live).st_ctime_ns > self.baseline_ns:
            # It may be a copy of a lower file that was renamed, or of one that stood here and is gone.
            origin = layer.origin(files.entry_path(entry.folder, entry.source), self.prefix)
            if origin:
                self.suspects.append((path, origin))
        self.note_layer_xattrs(entry, overlay_path)
        self.note_name(path, overlay_path, entry, None)
        self.note_index_link(overlay_path, entry)
        self.scanned.added.append(self.change(path, overlay_path, entry.status, None))

    def updated(self, path: str, overlay_path: str, entry: _Entry, status: os.stat_result) -> None:
        self.note_name(path, overlay_path, entry, None)
        self.note_index_link(overlay_path, entry)
        self.scanned.updated.append(self.change(path, overlay_path, entry.status, status))
        if status.st_nlink > 1 and not layer.keeps_links(self.prefix):
            self.scanned.partners_left.append(path)

    def note_name(self, path: str, overlay_path: str, entry: _Entry, live: os.stat_result | None) -> None:
        """Note a name of a file of several names."""
        if stat.S_ISDIR(entry.status.st_mode) or (entry.status.st_nlink == 1 and entry.layer != "index"):
            return
        key = "lower" if entry.layer == "lower" else "upper", entry.status.st_ino
        self.names.setdefault(key, []).append(_Name(path, overlay_path, entry.status, live))

    def note_index_link(self, overlay_path: str, entry: _Entry) -> None:
        """Note a path whose new content the upper layer holds under other names only."""
        if entry.layer == "index":
            index_path = os.path.join(layer.index_folder(self.root_folder.work), entry.source)
            self.scanned.index_links.append(IndexLink(overlay_path=overlay_path, index_path=index_path))
            self.scanned.layer_xattrs.append(overlay_path)

    def group_names(self) -> None:
        """List the names that must become further names of a live file: other names of it kept their content."""
        for names in self.names.values():
            kept = next((name for name in names if name.live), None)
            if kept is None or kept.live is None:
                continue
            for name in names:
                if name.live is None or name.live.st_ino != kept.live.st_ino:
                    link = HardLink(overlay_path=name.overlay_path, live=kept.overlay_path)
                    self.scanned.hard_links.append(link)
                    if name.live is not None:
                        change = self.change(name.path, name.overlay_path, name.status, name.live)
                        self.scanned.relinked.append(change)

    def partners_in(self, place: _Place) -> None:
        """Look at the lower names of files of which other names were changed or renamed.

        Only the names and inode numbers of the live tree's folders are read, and only if there are such files.
        """
        assert place.live is not None
        with os.scandir(place.live) as entries:
            below = sorted(entries, key=lambda entry: entry.name)
        for found in below:
            path, overlay_path = f"{place.path}/{found.name}", f"{place.overlay_path}/{found.name}"
            if found.is_dir(follow_symlinks=False):
                self.partners_below(place, found.name)
            elif files.lstat(place.upper, found.name) is not None:
                continue
            elif found.inode() in self.index:
                before = len(self.scanned.updated)
                entry = self.lower_entry(place.live, found)
                self.compare(place, entry, path, overlay_path, found.stat(follow_symlinks=False))
                if len(self.scanned.updated) > before and place.upper is None:
                    folder = os.fstat(place.live)
                    self.folder_times(place.path, place.overlay_path, folder, _metadata(folder, {}))
            elif ("lower", found.inode()) in self.names:
                status = found.stat(follow_symlinks=False)
                self.names["lower", found.inode()].append(_Name(path, overlay_path, status, status))

    def partners_below(self, place: _Place, name: str) -> None:
        assert place.live is not None
        path, overlay_path = f"{place.path}/{name}", f"{place.overlay_path}/{name}"
        status = files.lstat(place.upper, name)
        if status is not None and not stat.S_ISDIR(status.st_mode):
            return
        descriptors = [files.open_folder(place.live, name)]
        try:
            if status is not None and place.upper is not None:
                descriptors.append(files.open_folder(place.upper, name))
                marks = self.marks(descriptors[1], overlay_path)
                if marks.opaque or marks.redirect is not None:
                    return
            upper = descriptors[1] if status is not None else None
            self.partners_in(_Place(path, overlay_path, upper, None, descriptors[0], None))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def note_layer_xattrs(self, entry: _Entry, overlay_path: str) -> None:
        """Note a path with xattrs of the overlay."""
        if entry.layer != "upper":
            return
        names = files.list_xattrs(files.entry_path(entry.folder, entry.source))
        if any(name.startswith(self.prefix) for name in names):
            if not stat.S_ISDIR(entry.status.st_mode):
                try:
                    layer.check_file_xattrs(names, self.prefix)
                except layer.UnknownLayerError as error:
                    raise self.not_understood(overlay_path, error) from error
            self.scanned.layer_xattrs.append(overlay_path)

    def removed(self, path: str, overlay_path: str, folder: int | None, name: str, status: os.stat_result) -> None:
        """List a live path and everything below it as removed."""
        self.scanned.removed.append(self.change(path, overlay_path, status, status))
        if stat.S_ISDIR(status.st_mode):
            assert folder is not None
            inner = files.open_folder(folder, name)
            try:
                with os.scandir(inner) as entries:
                    for found in sorted(entries, key=lambda entry: entry.name):
                        self.removed(
                            f"{path}/{found.name}",
                            f"{overlay_path}/{found.name}",
                            inner,
                            found.name,
                            found.stat(follow_symlinks=False),
                        )
            finally:
                os.close(inner)

    def metadata(self, path: str, overlay_path: str, status: os.stat_result, before: Metadata, after: Metadata) -> None:
        """List a path of the same content by what differs about it."""
        change = MetadataChange(
            path=path,
            overlay_path=overlay_path,
            kind=files.kind(status),
            live_inode=status.st_ino,
            live_ctime_ns=status.st_ctime_ns,
            before=before,
            after=after,
        )
        if _permissions(before) != _permissions(after):
            self.scanned.permissions.append(change)
        elif not stat.S_ISDIR(status.st_mode):
            self.scanned.untouched.append(change)

    def folder_times(self, path: str, overlay_path: str, status: os.stat_result, after: Metadata) -> None:
        self.scanned.folders.append(
            FolderTimes(
                path=path,
                overlay_path=overlay_path,
                live_inode=status.st_ino,
                before_atime_ns=status.st_atime_ns,
                before_mtime_ns=status.st_mtime_ns,
                atime_ns=after.atime_ns,
                mtime_ns=after.mtime_ns,
            )
        )

    def change(self, path: str, overlay_path: str, status: os.stat_result, live: os.stat_result | None) -> Change:
        return Change(
            path=path,
            overlay_path=overlay_path,
            kind=files.kind(status),
            size=status.st_size,
            mode=stat.S_IMODE(status.st_mode),
            live_inode=live.st_ino if live else 0,
            live_ctime_ns=live.st_ctime_ns if live else 0,
        )

    def entry_metadata(self, entry: _Entry) -> Metadata:
        read = self.live_metadata if entry.layer == "lower" else self.layer_metadata
        return read(entry.folder, entry.source, entry.status)

    def live_metadata(self, folder: int, name: str, status: os.stat_result) -> Metadata:
        attributes = files.xattrs(folder, name)
        # The overlay hides xattrs under its prefix that the live file has of its own.
        return _metadata(status, {key: value for key, value in attributes.items() if not key.startswith(self.prefix)})

    def layer_metadata(self, folder: int, name: str, status: os.stat_result) -> Metadata:
        named = {layer.user_name(key, self.prefix): value for key, value in files.xattrs(folder, name).items()}
        return _metadata(status, {key: value for key, value in named.items() if key is not None})

    def marks(self, folder: int, overlay_path: str) -> layer.FolderMarks:
        try:
            return layer.folder_marks(folder, self.prefix)
        except layer.UnknownLayerError as error:
            raise self.not_understood(overlay_path, error) from error

    def not_understood(self, overlay_path: str, error: layer.UnknownLayerError) -> AcetateError:
        return AcetateError(
            f"{self.scanned.base_path}/{overlay_path}: the upper layer holds {error}, which is not understood",
            "nothing was copied; please report it with the kernel's version",
        )


def _permissions(metadata: Metadata) -> tuple[int, int, int, dict[str, bytes]]:
    """Return what of the metadata counts as permissions: all but the times."""
    return metadata.mode, metadata.uid, metadata.gid, metadata.xattrs


def _metadata(status: os.stat_result, attributes: dict[str, bytes]) -> Metadata:
    return Metadata(
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        atime_ns=status.st_atime_ns,
        mtime_ns=status.st_mtime_ns,
        xattrs=attributes,
    )
