"""How overlayfs writes changes down in an upper layer: this module answers questions about it and changes nothing.

Source of all that is said here: the kernel's Documentation/filesystems/overlayfs.rst and fs/overlayfs/.
"""

import ctypes
import os
import stat
import struct

import attrs

_ESCAPE = "overlay."


class UnknownLayerError(Exception):
    """The layer holds something whose meaning is not known here; the message names it."""


@attrs.frozen(kw_only=True)
class FolderMarks:
    """What the overlay wrote down about a folder of the upper layer.

    opaque: the lower folder of the same name does not show through. New folders are marked so as an optimisation:
    it does not mean that something was deleted.
    redirect: path of the lower folder that it was renamed from: from the overlay's root on if it begins with a
    slash, else a name in the lower folder of its parent. None if it was not renamed.
    impure: whether it may hold files that were copied up, which carry xattrs of the overlay.
    copied_up: whether it stands for a folder of the lower layer.
    xattr_whiteouts: whether its whiteouts may be files with an xattr instead of devices.
    marked: whether it carries any xattr of the overlay.
    """

    opaque: bool
    redirect: str | None
    impure: bool
    copied_up: bool
    xattr_whiteouts: bool
    marked: bool


def is_whiteout_device(status: os.stat_result) -> bool:
    """Return whether it is a whiteout: a character device 0:0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_xattr_whiteout(path: str, status: os.stat_result, prefix: str) -> bool:
    """Return whether it is a whiteout in its xattr form, as it may stand in a folder with `xattr_whiteouts`."""
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_size == 0
        and prefix + "whiteout" in os.listxattr(path, follow_symlinks=False)
    )


def folder_marks(folder: int, prefix: str) -> FolderMarks:
    """Return the marks of a folder of the upper layer, given as a descriptor or path.

    Raises OSError, and UnknownLayerError for an xattr that is not known here.
    """
    names = own_xattrs(os.listxattr(folder), prefix)
    for name in names:
        if name not in _KNOWN_FOLDER_XATTRS:
            raise UnknownLayerError(f"xattr {prefix}{name}")
    opaque = os.getxattr(folder, prefix + "opaque") if "opaque" in names else b""
    redirect = os.fsdecode(os.getxattr(folder, prefix + "redirect")) if "redirect" in names else None
    return FolderMarks(
        opaque=opaque == b"y",
        redirect=redirect,
        impure="impure" in names,
        copied_up="origin" in names,
        xattr_whiteouts=opaque == b"x",
        marked=bool(names),
    )


_KNOWN_FOLDER_XATTRS = frozenset({"opaque", "redirect", "impure", "origin", "uuid", "nlink", "upper", "protattr"})
_KNOWN_FILE_XATTRS = frozenset({"origin", "nlink", "impure", "protattr", "whiteout"})


def check_file_xattrs(names: list[str], prefix: str) -> None:
    """Raise UnknownLayerError when a file carries an xattr of the overlay that changes what the file means.

    A metacopy, for one, has the metadata only, its content is in the lower layer.
    """
    for name in own_xattrs(names, prefix):
        if name not in _KNOWN_FILE_XATTRS:
            raise UnknownLayerError(f"xattr {prefix}{name}")


def is_reserved(name: str) -> bool:
    """Return whether an overlay of either kind takes an xattr of that name for its own."""
    return name.startswith(("trusted.overlay.", "user.overlay."))


def own_xattrs(names: list[str], prefix: str) -> list[str]:
    """Return the overlay's own xattrs among the names, without the prefix."""
    start = len(prefix)
    return [name[start:] for name in names if name.startswith(prefix) and not name.startswith(_ESCAPE, start)]


def user_name(name: str, prefix: str) -> str | None:
    """Return the name that an xattr of a file in the layer has in the merged view, None for the overlay's own.

    A name under the overlay's prefix that the command itself set is stored escaped.
    """
    if not name.startswith(prefix):
        return name
    if name.startswith(_ESCAPE, len(prefix)):
        return prefix + name[len(prefix) + len(_ESCAPE) :]
    return None


def index_files(work: str) -> list[str]:
    """Return the names in a work folder's index (option index=on), one for each file of several names copied up.

    Each is a hard link to the copy in the upper layer; its name is the file handle of the original in the lower one.
    """
    try:
        with os.scandir(index_folder(work)) as entries:
            return [
                entry.name
                for entry in entries
                if not entry.is_dir(follow_symlinks=False) and not is_whiteout_device(entry.stat(follow_symlinks=False))
            ]
    except FileNotFoundError:
        return []


def index_folder(work: str) -> str:
    """Return the index of an overlay with the given work folder."""
    return os.path.join(work, "index")


def lower_inode(index_name: str, lower: int) -> int | None:
    """Return the inode number of the lower file that an index name stands for, None when it is gone.

    lower: descriptor of any folder on the lower file system. Takes CAP_DAC_READ_SEARCH (open_by_handle_at(2)).

    Raises UnknownLayerError for a name of another form than struct ovl_fb of fs/overlayfs/overlayfs.h.
    """
    try:
        raw = bytes.fromhex(index_name)
        _version, magic, length, _flags, handle_type = struct.unpack_from("5B", raw)
    except (ValueError, struct.error) as error:
        raise UnknownLayerError(f"index entry {index_name}") from error
    if magic != _HANDLE_MAGIC or length != len(raw):
        raise UnknownLayerError(f"index entry {index_name}")
    handle = raw[_HANDLE_START:]
    file_handle = struct.pack(f"Ii{len(handle)}s", len(handle), handle_type, handle)
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.open_by_handle_at(lower, ctypes.create_string_buffer(file_handle), os.O_PATH | os.O_CLOEXEC)
    if descriptor < 0:
        return None
    try:
        return os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


_HANDLE_MAGIC = 0xFB
_HANDLE_START = 5 + 16  # the head and the UUID of the lower file system


def origin(path: str, prefix: str) -> bytes:
    """Return the file handle of the lower file that a file was copied up from, b"" if none is noted."""
    try:
        raw = os.getxattr(path, prefix + "origin", follow_symlinks=False)
    except OSError:
        return b""
    return raw[_HANDLE_START:]


def handle(folder: int, name: str) -> bytes:
    """Return the file handle of a name in a folder (name_to_handle_at(2)), b"" where there is none."""
    buffer = ctypes.create_string_buffer(struct.pack("Ii", _HANDLE_SIZE, 0), 8 + _HANDLE_SIZE)
    mount_id = ctypes.c_int()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.name_to_handle_at(folder, os.fsencode(name), buffer, ctypes.byref(mount_id), 0):
        return b""
    size, _ = struct.unpack_from("Ii", buffer)
    return buffer.raw[8 : 8 + size]


_HANDLE_SIZE = 128  # MAX_HANDLE_SZ


def keeps_links(prefix: str) -> bool:
    """Return whether the overlay keeps the lower layer's hard links: with index=on, granted with trusted xattrs."""
    return prefix.startswith("trusted.")
