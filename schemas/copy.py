"""copy.json and copy.plan.json: how the changeset was applied to the live tree."""

from typing import Literal

import attrs

from schemas.manifest import Manifest
from schemas.scan import FolderTimes, HardLink

PLAN_FILE = "copy.plan.json"


@attrs.define(kw_only=True)
class Step:
    """One exchange between the live tree and the run folder; either side may be empty.

    path: in the live tree, a folder with all below it. overlay_path: where the new file waits before the step and the
    original is kept after it. new_inode, old_inode: inode numbers of the two files, 0 where there is none: they tell at
    any time whether the step was taken. old_ctime_ns: ctime of the live file when the step was planned.
    """

    path: str
    overlay_path: str
    new_inode: int
    old_inode: int
    old_ctime_ns: int


@attrs.define(kw_only=True)
class Conflict:
    """A live path that somebody else changed; reason: in which way, for people."""

    path: str
    reason: str


@attrs.frozen(kw_only=True)
class Plan(Manifest):
    """What copy or undo is going to do, written down before the first edit.

    direction: what the live tree will be.
    checked_ns: by overlay name, the newest ctime that a file not changed since the planning can have (see mount.json).
    xattr_prefix: that of the overlay's own xattrs.
    staged: overlay names of the roots on another mount than the run folder, into which the new files are copied first,
    each under the number of its step, in a folder that is gone at the end.
    ready: whether all new files wait as they are to be: with the real names of xattrs that the overlay escaped
    (`escaped`), linked to live files (`links`), copied where staged. new_inode is that of the copy then, and ready_ns
    the newest ctime that a new file not changed since then can have.
    """

    schema: Literal["acetate/plan/1"]
    direction: Literal["copied", "undone", "redone"]
    steps: list[Step]
    folders: list[FolderTimes]
    conflicts: list[Conflict]
    checked_ns: dict[str, int]
    xattr_prefix: Literal["trusted.overlay.", "user.overlay."]
    escaped: list[str]
    links: list[HardLink]
    staged: list[str]
    ready: bool = False
    ready_ns: dict[str, int] = attrs.field(factory=dict)


@attrs.define(kw_only=True)
class Done:
    """What was done to one path; below a folder, to everything in it.

    original: overlay path under which the file that was replaced or removed is kept, or None.
    """

    path: str
    action: Literal["added", "replaced", "removed"]
    original: str | None


@attrs.frozen(kw_only=True)
class Copied(Manifest):
    """What copy leaves.

    complete: False when conflicts stopped it, and nothing was copied.
    ended_ns: by overlay name, the newest ctime that a file not changed since then can have (see mount.json).
    originals: the folder that keeps the originals by overlay path, until cleanup moves it.
    """

    schema: Literal["acetate/copy/1"]
    complete: bool
    done: list[Done]
    conflicts: list[Conflict]
    originals: str
    ended_ns: dict[str, int]
