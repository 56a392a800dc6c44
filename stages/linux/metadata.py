"""Setting the metadata of a file: owner, mode, xattrs and times."""

import os
import stat
from collections.abc import Mapping
from typing import Protocol

from stages.linux import copying, files


class Wanted(Protocol):
    """Metadata that a file is to have; times in nanoseconds since the epoch."""

    @property
    def mode(self) -> int: ...  # noqa: D102
    @property
    def uid(self) -> int: ...  # noqa: D102
    @property
    def gid(self) -> int: ...  # noqa: D102
    @property
    def atime_ns(self) -> int: ...  # noqa: D102
    @property
    def mtime_ns(self) -> int: ...  # noqa: D102
    @property
    def xattrs(self) -> Mapping[str, bytes]: ...  # noqa: D102


def set_metadata(folder: int, name: str, was: Wanted, wanted: Wanted) -> None:
    """Give a name in a folder the metadata where it differs, a folder all but the times.

    Of the xattrs only those go that are in `was`: the file may have others that the overlay hid.

    Raises OSError.
    """
    # The owner first: chown(2) clears setuid and capabilities. Then the xattrs, since an ACL changes the mode.
    copying.set_owner(folder, name, wanted.uid, wanted.gid)
    present = files.xattrs(folder, name)
    path = files.entry_path(folder, name)
    for key in (present.keys() & was.xattrs.keys()) - wanted.xattrs.keys():
        os.removexattr(path, key, follow_symlinks=False)
    for key, value in wanted.xattrs.items():
        if present.get(key) != value:
            os.setxattr(path, key, value, follow_symlinks=False)
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode) and stat.S_IMODE(status.st_mode) != wanted.mode:
        os.chmod(path, wanted.mode)
    if not stat.S_ISDIR(status.st_mode) and status.st_mtime_ns != wanted.mtime_ns:
        os.utime(name, ns=(wanted.atime_ns, wanted.mtime_ns), dir_fd=folder, follow_symlinks=False)
