"""Copies of files and trees with all their metadata, by folder descriptors."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable

from stages.linux import edits, files

_FICLONE = 0x40049409  # ioctl_ficlone(2)

XattrName = Callable[[str], str | None]
"""Name that an xattr gets in the copy, None for one that is left out."""


class Copier:
    """Copies that keep content, holes, hard links among what is copied, mode, owner, times and xattrs."""

    def __init__(self, xattr_name: XattrName) -> None:
        """Begin with no files seen; files copied by one Copier keep the hard links among them."""
        self._xattr_name = xattr_name
        self._first_names: dict[tuple[int, int], str] = {}

    def copy(self, from_folder: int, name: str, to_folder: int, to_name: str) -> None:
        """Copy a file of any kind, a folder with all below it, to a name that must not exist yet. Raises OSError."""
        status = os.stat(name, dir_fd=from_folder, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            self._copy_folder(from_folder, name, to_folder, to_name)
        elif self._is_linked(status, to_folder, to_name):
            return
        elif stat.S_ISREG(status.st_mode):
            _copy_file(from_folder, name, to_folder, to_name)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=from_folder), to_name, dir_fd=to_folder)
        else:
            os.mknod(to_name, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev, dir_fd=to_folder)
        self.copy_metadata(from_folder, name, to_folder, to_name)

    def _is_linked(self, status: os.stat_result, to_folder: int, to_name: str) -> bool:
        """Link a file of several names to its copy if there is one; else remember that this becomes it."""
        if status.st_nlink == 1:
            return False
        identity = status.st_dev, status.st_ino
        first = self._first_names.get(identity)
        if first is None:
            self._first_names[identity] = _path(to_folder, to_name)
            return False
        os.link(first, to_name, dst_dir_fd=to_folder, follow_symlinks=False)
        return True

    def copy_whole(self, from_folder: int, name: str, to_folder: int) -> None:
        """Copy to a name that appears when all of the copy is there. Raises OSError."""
        temporary = ".acetate-copy"
        edits.remove_tree(to_folder, temporary)
        self.copy(from_folder, name, to_folder, temporary)
        edits.move(to_folder, temporary, to_folder, name)
        copied = _path(to_folder, temporary)
        for identity, first in self._first_names.items():
            if first == copied or first.startswith(copied + "/"):
                self._first_names[identity] = _path(to_folder, name) + first[len(copied) :]

    def _copy_folder(self, from_folder: int, name: str, to_folder: int, to_name: str) -> None:
        os.mkdir(to_name, 0o700, dir_fd=to_folder)
        source, target = files.open_folder(from_folder, name), files.open_folder(to_folder, to_name)
        try:
            for inner in os.listdir(source):
                self.copy(source, inner, target, inner)
        finally:
            os.close(source)
            os.close(target)

    def copy_metadata(self, from_folder: int, name: str, to_folder: int, to_name: str) -> None:
        """Give a file the owner, mode, xattrs and times of another of its kind. Raises OSError."""
        status = os.stat(name, dir_fd=from_folder, follow_symlinks=False)
        set_owner(to_folder, to_name, status.st_uid, status.st_gid)
        target = files.entry_path(to_folder, to_name)
        for key, value in files.xattrs(from_folder, name).items():
            new_key = self._xattr_name(key)
            if new_key is not None:
                with contextlib.suppress(PermissionError):
                    os.setxattr(target, new_key, value, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(to_name, stat.S_IMODE(status.st_mode), dir_fd=to_folder)
        os.utime(to_name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=to_folder, follow_symlinks=False)


def _path(folder: int, name: str) -> str:
    return os.readlink(f"/proc/self/fd/{folder}") + "/" + name


def set_owner(folder: int, name: str, uid: int, gid: int) -> None:
    """Set owner and group where they differ. Raises OSError."""
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if (status.st_uid, status.st_gid) != (uid, gid):
        os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=False)


def _copy_file(from_folder: int, name: str, to_folder: int, to_name: str) -> None:
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=from_folder)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(to_name, flags, 0o600, dir_fd=to_folder)
        try:
            _copy_content(source, target)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy_content(source: int, target: int) -> None:
    """Copy data and holes: as shared blocks where the file system can, else within the kernel."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
            raise
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # lseek(2): no data from here to the end
                return
            raise
        end = os.lseek(source, offset, os.SEEK_HOLE)
        while offset < end:
            copied = _copy_range(source, target, end - offset, offset)
            if not copied:
                return
            offset += copied


def _copy_range(source: int, target: int, count: int, offset: int) -> int:
    try:
        return os.copy_file_range(source, target, count, offset, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return os.pwrite(target, os.pread(source, min(count, 1 << 20), offset), offset)
