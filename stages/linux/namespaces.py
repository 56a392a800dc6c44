"""Mount namespaces that outlive the process that made them, and overlays mounted in them.

A namespace lives as long as a process sits in it (namespaces(7)); here that is a `sleep` of a session of its own.
Everything is done by the programs of util-linux, which are started in a few milliseconds, need no compiler and,
unlike a fork of the interpreter, are safe in a program that has threads.
"""

import contextlib
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Literal

import attrs

HOLDER_VARIABLE = "ACETATE_HOLDS"
"""Environment variable of a holder that names the run folder it holds mounts of."""

XattrPrefix = Literal["trusted.overlay.", "user.overlay."]

_TRUSTED_PREFIX: XattrPrefix = "trusted.overlay."
_USER_PREFIX: XattrPrefix = "user.overlay."


class NamespaceError(Exception):
    """No namespace could be made; the message is what the system said."""


@attrs.frozen(kw_only=True)
class Namespace:
    """A mount namespace, told by the process that holds it.

    pid, start_ticks, boot_id: which process; see proc_pid_stat(5) for the start time.
    user_namespace: whether the holder has a user namespace of its own, in which the user is root.
    """

    pid: int
    start_ticks: int
    boot_id: str
    user_namespace: bool

    def is_alive(self) -> bool:
        """Return whether the holder is still there."""
        return self.boot_id == boot_id() and self.start_ticks == _start_ticks(self.pid)

    def enter_argv(self) -> list[str]:
        """Return the words that, put before a command, run it in the namespace (nsenter(1))."""
        user = ["--user", "--preserve-credentials"] if self.user_namespace else []
        return ["nsenter", f"--target={self.pid}", *user, "--mount", "--"]

    def end(self) -> None:
        """End the holder, and with it the namespace and its mounts; does nothing when it is gone already."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.is_alive():
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [])
        finally:
            os.close(pidfd)


def start(run_folder: str) -> Namespace:
    """Start a holder with a mount namespace of its own and return the namespace.

    The superuser gets no user namespace where it may mount without one: only so may an overlay keep hard links and
    rename folders of its lower layer.

    Raises NamespaceError.
    """
    if os.geteuid() == 0:
        with contextlib.suppress(NamespaceError):
            return _start(run_folder, user_namespace=False)
    return _start(run_folder, user_namespace=True)


def _start(run_folder: str, *, user_namespace: bool) -> Namespace:
    user = ["--user", "--map-root-user"] if user_namespace else []
    # setsid --fork leaves the holder to init, so that it is nobody's zombie when a later process ends it.
    argv = ["setsid", "--fork", "unshare", *user, "--mount", "--propagation=private", "--"]
    argv += ["sh", "-c", "echo $$ && exec sleep infinity"]
    environment = {"PATH": os.environ.get("PATH", os.defpath), HOLDER_VARIABLE: run_folder}
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        if not line:
            raise NamespaceError(process.stderr.read().decode(errors="replace").strip())
    pid = int(line)
    start_ticks = _start_ticks(pid)
    if start_ticks is None:
        raise NamespaceError(f"process {pid}, which held the mounts, ended at once")
    return Namespace(pid=pid, start_ticks=start_ticks, boot_id=boot_id(), user_namespace=user_namespace)


def holders() -> list[tuple[Namespace, str]]:
    """Return the holders of the calling user that run now, each with the run folder that it holds mounts of."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            variables = Path(entry.path, "environ").read_bytes().split(b"\0")
            run_folder = next((v for v in variables if v.startswith(HOLDER_VARIABLE.encode() + b"=")), None)
            start_ticks = _start_ticks(int(entry.name))
            if run_folder is not None and start_ticks is not None:
                own = os.readlink(f"{entry.path}/ns/user") != os.readlink("/proc/self/ns/user")
                namespace = Namespace(
                    pid=int(entry.name), start_ticks=start_ticks, boot_id=boot_id(), user_namespace=own
                )
                found.append((namespace, os.fsdecode(run_folder.partition(b"=")[2])))
    return found


def boot_id() -> str:
    """Return what tells this boot of the machine from every other (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_ticks(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot, None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # proc_pid_stat(5): the second field is in parentheses and may itself hold any character.
    state, *fields = stat[stat.rindex(b")") + 2 :].split()
    return None if state in (b"Z", b"X") else int(fields[18])


def overlay_options(namespace: Namespace) -> list[str]:
    """Return the options that overlays are mounted with in the namespace.

    volatile: the layer is synced once, before it is copied, not with each fsync of the command. The kernel grants
    index and redirect_dir only with trusted xattrs, those only outside of user namespaces
    (Documentation/filesystems/overlayfs.rst).
    """
    if xattr_prefix(namespace) == _TRUSTED_PREFIX:
        return ["volatile", "index=on", "redirect_dir=on"]
    return ["volatile", "userxattr"]


def xattr_prefix(namespace: Namespace) -> XattrPrefix:
    """Return the prefix of the names under which overlays of the namespace keep their own xattrs."""
    identity_map = Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]
    return _TRUSTED_PREFIX if identity_map and not namespace.user_namespace else _USER_PREFIX


def mount_overlay(namespace: Namespace, *, lower: str, upper: str, work: str, merged: str) -> None:
    """Mount an overlay in the namespace.

    The kernel gets the folders as descriptors opened in the namespace, so that no name needs escaping and none can
    be exchanged on the way.

    Raises OSError when a folder can't be opened, NamespaceError when the mount is refused.
    """
    descriptors: list[int] = []
    try:
        for folder in (lower, upper, work, merged):
            path = f"/proc/{namespace.pid}/root{folder}"
            descriptors.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        lower_fd, upper_fd, work_fd, merged_fd = (f"/proc/self/fd/{fd}" for fd in descriptors)
        options = [*overlay_options(namespace), f"lowerdir={lower_fd}", f"upperdir={upper_fd}", f"workdir={work_fd}"]
        mount = ["mount", "--no-mtab", "--internal-only", "--no-canonicalize", "-t", "overlay", "-o", ",".join(options)]
        result = subprocess.run(
            [*namespace.enter_argv(), *mount, "acetate", merged_fd],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
            check=False,
        )
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if result.returncode:
        raise NamespaceError(result.stderr.decode(errors="replace").strip())
