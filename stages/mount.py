"""mount: mount one overlay per root in a mount namespace that lives on between processes."""

import os
import shutil
from pathlib import Path

import attrs

from schemas.mount import Holder, Mounted, OverlayMount
from schemas.prepare import Prepared, RootFolder
from stages.errors import UsageError
from stages.linux import clock, namespaces


def mount(prepared: Prepared, earlier: Mounted | None = None) -> Mounted:
    """Mount the overlays of a run and return how to find them.

    earlier: what an earlier mounting of the same run left. What it holds is used on when it is still there; the
    baseline for conflicts stays that of the first mounting.

    Raises UsageError when namespaces or overlays can't be had on this machine.
    """
    if earlier and namespaces.Namespace(**attrs.asdict(earlier.holder)).is_alive():
        return earlier
    baseline = (
        earlier.baseline_ns if earlier else {root.overlay: clock.newest_stamp(root.path) for root in prepared.roots}
    )
    namespace = _start_namespace(prepared)
    try:
        for root in prepared.roots:
            _mount(namespace, root)
            clock.wait_past(root.path, baseline[root.overlay])
    except BaseException:
        namespace.end()
        raise
    options = namespaces.overlay_options(namespace)
    return Mounted(
        schema="acetate/mount/1",
        run=prepared.run,
        holder=Holder(**attrs.asdict(namespace)),
        mounts=[OverlayMount(overlay=root.overlay, merged=root.merged, options=options) for root in prepared.roots],
        xattr_prefix=namespaces.xattr_prefix(namespace),
        baseline_ns=baseline,
    )


def _start_namespace(prepared: Prepared) -> namespaces.Namespace:
    try:
        return namespaces.start(prepared.run_folder)
    except namespaces.NamespaceError as error:
        raise UsageError(f"no mount namespace can be made: {error}", _namespace_hint()) from error


def _namespace_hint() -> str:
    for setting, forbidding, mending in (
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
        ("user.max_user_namespaces", "0", "10000"),
    ):
        path = Path("/proc/sys", setting.replace(".", "/"))
        if path.exists() and path.read_text().strip() == forbidding:
            return f"allow user namespaces: sysctl -w {setting}={mending}"
    return "allow user namespaces on this machine, or run as root with CAP_SYS_ADMIN"


def _mount(namespace: namespaces.Namespace, root: RootFolder) -> None:
    _clear_volatile_mark(root)
    try:
        namespaces.mount_overlay(namespace, lower=root.path, upper=root.upper, work=root.work, merged=root.merged)
    except namespaces.NamespaceError as error:
        raise UsageError(f"the overlay over {root.path} can't be mounted: {error}", _overlay_hint(root)) from error


def _clear_volatile_mark(root: RootFolder) -> None:
    """Remove what a volatile overlay leaves in its work folder so that it is not mounted again unawares.

    It guards against writes that a crash of the machine lost; that none were lost is seen to before this is called.
    """
    inner = Path(root.work, "work")
    if inner.is_dir():
        os.chmod(inner, 0o700)
        incompat = inner / "incompat"
        if incompat.is_dir():
            for path in (incompat, incompat / "volatile"):
                path.chmod(0o700)
            shutil.rmtree(incompat)


def _overlay_hint(root: RootFolder) -> str:
    known = Path("/proc/filesystems").read_text().split()
    if "overlay" not in known:
        return "load overlayfs: modprobe overlay"
    kind = _file_system_kind(root.upper)
    if kind == "overlay":
        return f"{root.upper} is on an overlay itself: set XDG_CACHE_HOME to a folder on a tmpfs, for one"
    return f"see the kernel's log (dmesg); {root.path} is on {_file_system_kind(root.path)}, {root.upper} on {kind}"


def _file_system_kind(path: str) -> str:
    """Return the type of the file system that the path is on (proc_pid_mountinfo(5))."""
    device = Path(path).stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split()
        if fields[2] == name:
            return fields[fields.index("-") + 1]
    return "an unknown file system"
