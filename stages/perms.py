"""perms: carry permissions and times over to what kept its content. These are no changes in the scan's lists."""

import errno
import os

from schemas.copy import Copied
from schemas.perms import MetadataSet, Permitted, Refused
from schemas.prepare import Prepared
from schemas.scan import MetadataChange, Scanned
from stages.linux import clock, edits, metadata


def perms(prepared: Prepared, scanned: Scanned, copied: Copied) -> Permitted:
    """Give the live files the metadata that they have in the overlay where it differs, and return what was set.

    What a conflict kept from being copied is left alone. What the user may not set is listed as refused.

    Raises OSError.
    """
    left = {conflict.path for conflict in copied.conflicts} if prepared.request.conflicts != "overwrite" else set()
    permitted = Permitted(schema="acetate/perms/1", run=prepared.run, done=[], refused=[], ended_ns={})
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
    for root in prepared.roots:
        permitted.ended_ns[root.overlay] = stamp = clock.newest_stamp(root.path)
        # So that undo can tell any later change by its ctime.
        clock.wait_past(root.path, stamp)
    return permitted


def _carry_over(permitted: Permitted, item: MetadataChange, folder: int, name: str) -> None:
    try:
        metadata.set_metadata(folder, name, item.before, item.after)
    except PermissionError as error:
        if error.errno != errno.EPERM:
            raise
        permitted.refused.append(Refused(path=item.path, what=_difference(item), reason=os.strerror(errno.EPERM)))
    else:
        permitted.done.append(MetadataSet(path=item.path, before=item.before, after=item.after))


def _difference(item: MetadataChange) -> str:
    before, after = item.before, item.after
    fields = ("mode", "uid", "gid", "mtime_ns", "xattrs")
    return ", ".join(field for field in fields if getattr(before, field) != getattr(after, field))
