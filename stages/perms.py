"""perms: carry permissions and times over to what kept its content. These are no changes in the scan's lists."""

import errno
import os
import stat

from schemas.copy import Copied
from schemas.perms import MetadataSet, Permitted, Refused
from schemas.prepare import Metadata, Prepared
from schemas.scan import MetadataChange, Scanned
from stages.linux import copying, edits, files


def perms(prepared: Prepared, scanned: Scanned, copied: Copied) -> Permitted:
    """Give the live files the metadata that they have in the overlay where it differs, and return what was set.

    What a conflict kept from being copied is left alone. What the user may not set is listed as refused.

    Raises OSError.
    """
    left = {conflict.path for conflict in copied.conflicts} if prepared.request.conflicts != "overwrite" else set()
    permitted = Permitted(schema="acetate/perms/1", run=prepared.run, done=[], refused=[])
    live = {root.overlay: edits.Folders(root.path) for root in prepared.roots}
    try:
        for item in [*scanned.permissions, *scanned.untouched]:
            if item.before != item.after and item.path not in left:
                overlay, _, relative = item.overlay_path.partition("/")
                parent, _, name = relative.rpartition("/")
                _carry_over(permitted, item, live[overlay].open(parent), name or ".")
    finally:
        for folders in live.values():
            folders.close()
    return permitted


def _carry_over(permitted: Permitted, item: MetadataChange, folder: int, name: str) -> None:
    try:
        _set_metadata(folder, name, item.after)
    except PermissionError as error:
        if error.errno != errno.EPERM:
            raise
        permitted.refused.append(Refused(path=item.path, what=_difference(item), reason=error.strerror))
    else:
        permitted.done.append(MetadataSet(path=item.path, before=item.before, after=item.after))


def _set_metadata(folder: int, name: str, wanted: Metadata) -> None:
    # The owner first: chown(2) clears setuid and capabilities. Then the xattrs, since an ACL changes the mode.
    copying.set_owner(folder, name, wanted.uid, wanted.gid)
    present = files.xattrs(folder, name)
    path = files.entry_path(folder, name)
    for key in present.keys() - wanted.xattrs.keys():
        if files.is_user_settable(key):
            os.removexattr(path, key, follow_symlinks=False)
    for key, value in wanted.xattrs.items():
        if present.get(key) != value:
            os.setxattr(path, key, value, follow_symlinks=False)
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode) and stat.S_IMODE(status.st_mode) != wanted.mode:
        os.chmod(path, wanted.mode)
    if not stat.S_ISDIR(status.st_mode) and status.st_mtime_ns != wanted.mtime_ns:
        os.utime(name, ns=(wanted.atime_ns, wanted.mtime_ns), dir_fd=folder, follow_symlinks=False)


def _difference(item: MetadataChange) -> str:
    before, after = item.before, item.after
    fields = ("mode", "uid", "gid", "mtime_ns", "xattrs")
    return ", ".join(field for field in fields if getattr(before, field) != getattr(after, field))
