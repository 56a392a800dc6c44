"""prepare.json: the request and the run folder made for it."""

from typing import Literal

import attrs

from schemas.manifest import Manifest


@attrs.frozen(kw_only=True)
class Request:
    """What the user asked for.

    argv: the command as a list of arguments.
    roots: the project folders that the command may write to, absolute real paths; the first is its working folder.
    network: whether the command may use the network.
    timeout: seconds after which everything the command started is ended; None for no limit.
    on_failure: whether the changes of a command that failed are kept in the run or copied all the same.
    conflicts: what copy does when somebody else changed a path of the changeset.
    sync: whether copy says done only when the data is on disk.
    """

    argv: list[str]
    roots: list[str]
    network: bool = False
    timeout: float | None = None
    on_failure: Literal["keep", "copy"] = "keep"
    conflicts: Literal["stop", "skip", "overwrite"] = "stop"
    sync: bool = True


@attrs.frozen(kw_only=True)
class Metadata:
    """Permissions and the like of one file, as lstat(2) and listxattr(2) tell them.

    mode: permission bits with setuid, setgid and sticky.
    atime_ns, mtime_ns: nanoseconds since the epoch.
    xattrs: extended attributes by name, ACLs (system.posix_acl_*) and capabilities among them; never the overlay's own.
    """

    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    xattrs: dict[str, bytes] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class RootFolder:
    """One root and the folders of its overlay.

    overlay: its name in the overlay map.
    path: the root's real path, the overlay's lower layer.
    twin: the metadata that upper was given so that the merged root begins as the root's twin.
    """

    overlay: str
    path: str
    upper: str
    work: str
    merged: str
    twin: Metadata


@attrs.frozen(kw_only=True)
class Prepared(Manifest):
    """What prepare leaves.

    base_path: the run's upper folder.
    overlay_map: overlay name → the root's real path.
    """

    schema: Literal["acetate/prepare/1"]
    request: Request
    run_folder: str
    base_path: str
    overlay_map: dict[str, str]
    roots: list[RootFolder]
