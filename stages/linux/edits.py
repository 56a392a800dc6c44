"""Edits of a tree by folder descriptors: each one atomic, none follows a symlink."""

import ctypes
import errno
import functools
import os
import stat
from collections.abc import Callable
from types import TracebackType

from stages.linux import files

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


@functools.cache
def _libc_function(name: str) -> Callable[..., int]:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def _call(name: str, path: str, *arguments: int | bytes) -> None:
    while _libc_function(name)(*arguments):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), path)


def move(from_folder: int, name: str, to_folder: int, to_name: str) -> None:
    """Rename, never over something that exists (renameat2(2), RENAME_NOREPLACE).

    Raises OSError, FileExistsError when the new name is taken.
    """
    _call("renameat2", to_name, from_folder, os.fsencode(name), to_folder, os.fsencode(to_name), _RENAME_NOREPLACE)


def exchange(folder_a: int, name_a: str, folder_b: int, name_b: str) -> None:
    """Exchange two names of any kind in one step (renameat2(2), RENAME_EXCHANGE). Raises OSError."""
    _call("renameat2", name_b, folder_a, os.fsencode(name_a), folder_b, os.fsencode(name_b), _RENAME_EXCHANGE)


def sync_file_system(folder: int) -> None:
    """Write all of the folder's file system to disk (syncfs(2)).

    Raises OSError also for a write that failed since the descriptor was opened.
    """
    _call("syncfs", f"/proc/self/fd/{folder}", folder)


def remove_tree(parent: int, name: str) -> None:
    """Remove a file or a folder and all below it, also folders whose mode keeps their owner out.

    Nothing happens when it is gone already. Raises OSError.
    """
    status = files.lstat(parent, name)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    if status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(name, stat.S_IRWXU, dir_fd=parent)
    folder = files.open_folder(parent, name)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    remove_tree(folder, entry.name)
                else:
                    os.unlink(entry.name, dir_fd=folder)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=parent)


class Folders:
    """Descriptors of the folders below a base folder, kept open along the current path only.

    For paths in the order of a walk each folder is opened once.
    """

    def __init__(self, base: str) -> None:
        """Open the base folder. Raises OSError."""
        self._names: list[str] = []
        self._descriptors = [os.open(base, files.FOLDER_FLAGS)]

    def open(self, path: str) -> int:
        """Return the descriptor of the folder at the path relative to the base, "" for the base itself.

        It stays valid until the next call. Raises OSError; NotADirectoryError when a symlink or file is on the way.
        """
        names = path.split("/") if path else []
        same = 0
        for name, current in zip(names, self._names, strict=False):
            if name != current:
                break
            same += 1
        self._close_below(same)
        for name in names[same:]:
            self._descriptors.append(files.open_folder(self._descriptors[-1], name))
            self._names.append(name)
        return self._descriptors[-1]

    def _close_below(self, depth: int) -> None:
        del self._names[depth:]
        while len(self._descriptors) > depth + 1:
            os.close(self._descriptors.pop())

    def close(self) -> None:
        """Close all."""
        self._close_below(0)
        os.close(self._descriptors.pop())

    def __enter__(self) -> "Folders":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all."""
        self.close()
