"""mount.json: how the overlays are mounted and what holds them."""

from typing import Literal

import attrs

from schemas.manifest import Manifest


@attrs.frozen(kw_only=True)
class Holder:
    """The process whose mount namespace holds the mounts.

    pid, start_ticks: which process it is; the start time (proc_pid_stat(5), clock ticks since boot) tells it from a
    later one with the same pid.
    boot_id: /proc/sys/kernel/random/boot_id when it was started.
    user_namespace: whether it has a user namespace of its own, as for an unprivileged user.
    """

    pid: int
    start_ticks: int
    boot_id: str
    user_namespace: bool


@attrs.frozen(kw_only=True)
class OverlayMount:
    """One overlay mount, visible in the holder's mount namespace only."""

    overlay: str
    merged: str
    options: list[str]


@attrs.frozen(kw_only=True)
class Mounted(Manifest):
    """What mount leaves.

    xattr_prefix: where this overlay keeps its own xattrs: trusted.overlay. or user.overlay.
    baseline_ns: by overlay name, the newest ctime (nanoseconds since the epoch, on the root's own file system) that a
    file unchanged since the mounting can have.
    """

    schema: Literal["acetate/mount/1"]
    holder: Holder
    mounts: list[OverlayMount]
    xattr_prefix: Literal["trusted.overlay.", "user.overlay."]
    baseline_ns: dict[str, int]
