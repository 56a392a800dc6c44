"""The arguments of bubblewrap: the only place that knows its options (bwrap(1), 0.5 or newer)."""

import os
import shutil
from collections.abc import Mapping, Sequence

import attrs

_KEPT_CAPABILITIES = (
    # What building and installing needs on files and among the command's own processes; none of them lets a process
    # change mounts, reach a file by its handle, trace, load or reboot (capabilities(7)).
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
# Root may write to these by the mode of their files alone, with no capability; bwrap itself leaves them as they are.
_KERNEL_SETTINGS = (
    "/proc/acpi",
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/scsi",
    "/proc/sys",
    "/proc/sysrq-trigger",
)
# A socket on a read-only file system can be connected to all the same, and behind those in /run are services that do
# things for their caller: containers, units, keys. What programs need from there without talking to anybody is left.
_SERVICES = "/run"
_LEFT_OF_SERVICES = ("/run/booted-system", "/run/current-system", "/run/opengl-driver")
_RESOLVER = "/etc/resolv.conf"
_TEMPORARY_FOLDER_VARIABLES = ("TMPDIR", "TMP", "TEMP")


@attrs.frozen(kw_only=True)
class Sandbox:
    """What a command may see and change.

    roots: pairs of a folder and the path that it is bound over, writable; the first path is the working folder.
    hidden: folders that are empty and read-only in the sandbox, but for roots in them; /run is one of them always.
    network: whether the command has the network, and with it the abstract sockets, of its caller.
    user_namespace: whether bubblewrap is started in a user namespace in which the caller is root.
    unset: environment variables that the command does not get.
    """

    roots: Sequence[tuple[str, str]]
    hidden: Sequence[str] = ()
    network: bool = False
    user_namespace: bool = False
    unset: Sequence[str] = ()


def is_missing() -> bool:
    """Return whether bubblewrap is not installed."""
    return shutil.which("bwrap") is None


def argv(sandbox: Sandbox, command: Sequence[str], *, status_fd: int, environment: Mapping[str, str]) -> list[str]:
    """Return the words that run the command in the sandbox, as the calling user and group.

    status_fd: descriptor that bubblewrap writes its JSON status to; the command does not get it.
    environment: what bubblewrap is started with.
    """
    return [
        "bwrap",
        *_file_system(sandbox),
        *_namespaces(sandbox),
        *_capabilities(),
        *_environment(sandbox, environment),
        "--die-with-parent",
        "--new-session",
        "--json-status-fd",
        str(status_fd),
        "--",
        *command,
    ]


def _file_system(sandbox: Sandbox) -> list[str]:
    # bwrap's binds are recursive and go with nosuid and nodev: every mount below / becomes read-only.
    words = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--perms", "1777", "--tmpfs", "/tmp"]
    if os.geteuid() == 0:
        words += [word for path in _KERNEL_SETTINGS for word in ("--ro-bind-try", path, path)]
    hidden = [*sandbox.hidden, *([_SERVICES] if os.path.isdir(_SERVICES) else [])]
    for folder in hidden:
        words += ["--tmpfs", folder]
    for path in (*_LEFT_OF_SERVICES, os.path.realpath(_RESOLVER)):
        if path.startswith(f"{_SERVICES}/"):
            words += ["--ro-bind-try", path, path]
    # After the masks, so that a root may lie in a masked folder; before the masks become read-only, since bwrap makes
    # the root's mount point in them.
    for folder, path in sandbox.roots:
        words += ["--bind", folder, path]
    for folder in hidden:
        words += ["--remount-ro", folder]
    return [*words, "--chdir", sandbox.roots[0][1]]


def _namespaces(sandbox: Sandbox) -> list[str]:
    # The cgroup namespace stays: /sys/fs/cgroup is the host's, and programs look up their limits there by the path in
    # /proc/self/cgroup.
    words = ["--unshare-pid", "--unshare-ipc", "--unshare-uts"]
    if not sandbox.network:
        words.append("--unshare-net")
    if sandbox.user_namespace:
        words += ["--unshare-user", "--uid", str(os.geteuid()), "--gid", str(os.getegid())]
    return words


def _capabilities() -> list[str]:
    # Without this bwrap would leave all that it has to the command, root's or those of the user namespace, with which
    # the command could make everything writable again.
    kept = _KEPT_CAPABILITIES if os.geteuid() == 0 else ()
    return ["--cap-drop", "ALL", *(word for name in kept for word in ("--cap-add", name))]


def _environment(sandbox: Sandbox, environment: Mapping[str, str]) -> list[str]:
    words = []
    for name in _TEMPORARY_FOLDER_VARIABLES:
        if name in environment:
            words += ["--setenv", name, "/tmp"]
    for name in sandbox.unset:
        words += ["--unsetenv", name]
    return words
