"""The clock that a file system stamps its files with."""

import os
import time

_CLOCK_REALTIME_COARSE = 5  # clock_gettime(2)


def newest_stamp(folder: str) -> int:
    """Return the ctime that a file changed now gets on the folder's file system, nanoseconds since the epoch.

    It comes from a file without a name (O_TMPFILE, open(2)), which changes nothing in the folder; where the file system
    has none, from the kernel's coarse clock, by which local file systems stamp.
    """
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    try:
        return os.fstat(descriptor).st_ctime_ns
    finally:
        os.close(descriptor)


def wait_past(folder: str, stamp: int, *, longest: float = 1.0) -> None:
    """Wait until files changed in the folder get a later stamp than the given one, `longest` seconds at most.

    Stamps grow by a tick of some milliseconds at a time.
    """
    end = time.monotonic() + longest
    while newest_stamp(folder) <= stamp and time.monotonic() < end:
        time.sleep(0.001)
