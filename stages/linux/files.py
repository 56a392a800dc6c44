"""Kinds, xattrs and walks of files, by folder descriptors: no symlink is ever followed."""

import contextlib
import errno
import os
import resource
import stat
import sys
from collections.abc import Iterator
from typing import Literal

Kind = Literal["file", "folder", "symlink", "fifo", "socket", "character device", "block device"]

_KINDS: dict[int, Kind] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def kind(status: os.stat_result) -> Kind:
    """Return the kind of the file."""
    return _KINDS[stat.S_IFMT(status.st_mode)]


def lstat(folder: int | None, name: str) -> os.stat_result | None:
    """Return the status of a name in a folder, None when there is none (or no folder)."""
    if folder is None:
        return None
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def open_folder(parent: int, name: str) -> int:
    """Open a folder in a folder. Raises OSError, ENOTDIR or ELOOP when it is a symlink."""
    return os.open(name, FOLDER_FLAGS, dir_fd=parent)


def entry_path(folder: int, name: str) -> str:
    """Return a path for calls that take no folder descriptor, such as those for xattrs."""
    return f"/proc/self/fd/{folder}/{name}"


def xattrs(folder: int, name: str) -> dict[str, bytes]:
    """Return the xattrs of a name in a folder that a command could change, ACLs and capabilities among them."""
    path = entry_path(folder, name)
    return {
        attribute: os.getxattr(path, attribute, follow_symlinks=False)
        for attribute in list_xattrs(path)
        if is_user_settable(attribute)
    }


def is_user_settable(attribute: str) -> bool:
    """Return whether a command in the sandbox could set the xattr (xattr(7)).

    Not so the trusted ones and those of security modules; capabilities take the superuser.
    """
    if attribute == "security.capability":
        return os.geteuid() == 0
    return attribute.startswith(("user.", "system.posix_acl_"))


def list_xattrs(path: str) -> list[str]:
    """Return the names of a file's xattrs, none where the file system has none."""
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES):
            return []
        raise


def space(path: str) -> int:
    """Return how many bytes a folder with all below it takes on disk, as far as the caller may look."""
    total = os.lstat(path).st_blocks * 512
    with contextlib.suppress(PermissionError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += space(entry.path)
            else:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def newest_change_below(parent: int, name: str) -> int:
    """Return the newest ctime of what is below a folder, in nanoseconds since the epoch, 0 if nothing is.

    Files of several names are left out: their ctime changes with any of their names.
    """
    newest = 0
    folder = open_folder(parent, name)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    newest = max(newest, status.st_ctime_ns, newest_change_below(folder, entry.name))
                elif status.st_nlink == 1:
                    newest = max(newest, status.st_ctime_ns)
    finally:
        os.close(folder)
    return newest


def same_content(folder_a: int, folder_b: int, name: str, name_b: str | None = None) -> bool:
    """Return whether two files of the same kind and size have the same content or link target."""
    name_b = name if name_b is None else name_b
    status = os.stat(name, dir_fd=folder_a, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(name, dir_fd=folder_a) == os.readlink(name_b, dir_fd=folder_b)
    if stat.S_ISREG(status.st_mode):
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with (
            open(os.open(name, flags, dir_fd=folder_a), "rb", buffering=0) as a,
            open(os.open(name_b, flags, dir_fd=folder_b), "rb", buffering=0) as b,
        ):
            return _same_bytes(a.fileno(), b.fileno())
    other = os.stat(name_b, dir_fd=folder_b, follow_symlinks=False)
    return status.st_rdev == other.st_rdev


def _same_bytes(a: int, b: int) -> bool:
    block = 1 << 20
    offset = 0
    while True:
        left, right = os.pread(a, block, offset), os.pread(b, block, offset)
        if left != right:
            return False
        if not left:
            return True
        offset += len(left)


@contextlib.contextmanager
def deep_walks() -> Iterator[None]:
    """Allow walks as deep as the system allows open descriptors; they hold a few for each level (getrlimit(2)).

    Recursion of functions in Python costs no C stack since Python 3.11.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    recursion = sys.getrecursionlimit()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sys.setrecursionlimit(max(recursion, 1_000_000))
    try:
        yield
    finally:
        sys.setrecursionlimit(recursion)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
