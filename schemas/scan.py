"""scan.json: the changeset."""

from typing import Literal

import attrs

from schemas.manifest import Manifest
from schemas.prepare import Metadata

Kind = Literal["file", "folder", "symlink", "fifo", "socket", "character device", "block device"]


@attrs.define(kw_only=True)
class Change:
    """One path that was added, updated or removed.

    path: absolute, in the live tree. overlay_path: from the base path on.
    kind, size (bytes), mode (permission bits): of the new file, or of the removed one.
    live_inode, live_ctime_ns: which live file the scan saw there, by inode number and ctime; 0 for an added path.
    """

    path: str
    overlay_path: str
    kind: Kind
    size: int
    mode: int
    live_inode: int = 0
    live_ctime_ns: int = 0


@attrs.define(kw_only=True)
class MetadataChange:
    """One path whose content did not change.

    before: metadata of the live file that the scan saw; after: what it is in the overlay.
    """

    path: str
    overlay_path: str
    kind: Kind
    live_inode: int
    live_ctime_ns: int
    before: Metadata
    after: Metadata


@attrs.define(kw_only=True)
class FolderTimes:
    """Times of a folder that stands in both layers, nanoseconds since the epoch; before: those of the live one."""

    path: str
    overlay_path: str
    live_inode: int
    before_atime_ns: int
    before_mtime_ns: int
    atime_ns: int
    mtime_ns: int


@attrs.define(kw_only=True)
class Redirect:
    """A folder that was renamed in the overlay; lower_path: the live folder that shows through it."""

    overlay_path: str
    lower_path: str


@attrs.define(kw_only=True)
class IndexLink:
    """A path whose file changed by way of another of its names; index_path: where the overlay keeps that file."""

    overlay_path: str
    index_path: str


@attrs.define(kw_only=True)
class HardLink:
    """A path that became a further name of a file that stays in the live tree at the overlay path `live`."""

    overlay_path: str
    live: str


@attrs.frozen(kw_only=True)
class Scanned(Manifest):
    """What scan leaves; each list in the order of a walk, every folder before what is in it, names sorted.

    Further names of files that were changed by way of a hard link come last.

    A path whose kind changed stands in removed and in added.
    permissions: paths of the same content whose mode, owner, ACL or other xattrs differ.
    untouched: paths that were copied up with content and permissions as before; at most their times differ.
    folders: the folders above changes, and others that were copied up.
    revived: added paths that were there when the overlay was mounted, and that somebody else has removed since.
    layer_xattrs: overlay paths of what carries xattrs of the overlay, which must not reach the live tree.
    relinked: paths of the same content that stand for another inode: hard links were made or broken.
    index_links, hard_links: how names of one file belong together.
    partners_left: updated paths whose file has further names in the live tree, which keep the old content: the overlay
    does not tell a file that was written in place from one that was replaced.
    redirects: the folders that were renamed in the overlay; their content stands in the lower layer in part.
    """

    schema: Literal["acetate/scan/1"]
    base_path: str
    overlay_map: dict[str, str]
    added: list[Change] = attrs.field(factory=list)
    updated: list[Change] = attrs.field(factory=list)
    removed: list[Change] = attrs.field(factory=list)
    permissions: list[MetadataChange] = attrs.field(factory=list)
    untouched: list[MetadataChange] = attrs.field(factory=list)
    folders: list[FolderTimes] = attrs.field(factory=list)
    relinked: list[Change] = attrs.field(factory=list)
    index_links: list[IndexLink] = attrs.field(factory=list)
    hard_links: list[HardLink] = attrs.field(factory=list)
    partners_left: list[str] = attrs.field(factory=list)
    revived: list[str] = attrs.field(factory=list)
    layer_xattrs: list[str] = attrs.field(factory=list)
    redirects: list[Redirect] = attrs.field(factory=list)
