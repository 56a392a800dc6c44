"""A command in its sandbox: started, watched, ended with all that it started, and accounted for."""

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from stages.linux import bubblewrap
from stages.linux.namespaces import Namespace
from stages.linux.streams import Streams

if TYPE_CHECKING:
    import resource

TIMEOUT_STATUS = 124
"""The exit status of a command that ran out of time, as timeout(1) has it."""

GRACE = 2.0
"""Seconds that an interrupted command has to end by itself."""

_CHILD_PID = re.compile(rb'"child-pid": *(\d+)')
_EXIT_CODE = re.compile(rb'"exit-code": *(\d+)')
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37


class SandboxError(Exception):
    """The sandbox could not be set up, the command did not begin; the message is what the system said."""


@attrs.frozen(kw_only=True)
class Ended:
    """How a command ended.

    exit_status: as a shell tells it: 128+n when signal n ended it, 124 after a timeout, 127 when there is no such
    command, 126 when it can't be executed.
    started_ns: nanoseconds since the epoch. duration_ns: until the command itself ended, the sandbox's start included.
    user_cpu_ns, system_cpu_ns: CPU time of the sandbox and all in it, nanoseconds.
    max_memory: largest resident set of one process in it, bytes.
    """

    exit_status: int
    timed_out: bool
    started_ns: int
    duration_ns: int
    user_cpu_ns: int
    system_cpu_ns: int
    max_memory: int


def run(
    namespace: Namespace,
    sandbox: bubblewrap.Sandbox,
    command: Sequence[str],
    *,
    streams: Streams,
    environment: Mapping[str, str],
    timeout: float | None = None,
) -> Ended:
    """Run a command in a sandbox in the namespace, and return when all that it started is dead.

    streams: entered. timeout: seconds after which everything is killed, None for no limit.

    SIGINT, as KeyboardInterrupt, and any signal n that a handler turns into SystemExit(128 + n) are passed on to the
    command, which then has GRACE seconds to end; a second one ends it at once. The exception goes on its way after
    that.

    Raises SandboxError; OSError when output can't be kept or passed on, with everything ended.
    """
    interrupt: BaseException | None = None
    timed_out = False
    with _adopting_orphans():
        process = _Process(namespace, sandbox, command, streams, environment)
        try:
            timed_out = not process.relay_until_end(timeout)
        except (KeyboardInterrupt, SystemExit) as raised:
            interrupt = raised
            if process.signal_command(_signal_of(raised)):
                process.relay_until_end(GRACE)
        finally:
            process.end()
    streams.drain()
    if interrupt is not None:
        raise interrupt
    return process.result(timed_out=timed_out)


class _Process:
    """Bubblewrap: the process that we start, and the sandbox's pid 1, which that one starts.

    Bubblewrap ends with the command, and pid 1 is killed a little later. When pid 1 has ended, the kernel has killed
    and reaped all in its pid namespace (pid_namespaces(7)).
    """

    def __init__(
        self,
        namespace: Namespace,
        sandbox: bubblewrap.Sandbox,
        command: Sequence[str],
        streams: Streams,
        environment: Mapping[str, str],
    ) -> None:
        self._streams = streams
        self._status = b""
        self._usages: list[resource.struct_rusage] = []
        self._returned: int | None = None
        self._duration_ns = 0
        status_fd, status_end = os.pipe()
        words = [*streams.session_argv(environment), *command]
        argv = bubblewrap.argv(sandbox, words, status_fd=status_end, environment=environment)
        self._started_ns = time.time_ns()
        self._started = time.monotonic_ns()
        try:
            # In a session of its own, no Ctrl-C reaches bubblewrap, which would take the command with it.
            self._popen = subprocess.Popen(
                [*namespace.enter_argv(), *argv],
                stdin=streams.stdin,
                stdout=streams.stdout,
                stderr=streams.stderr,
                pass_fds=[status_end],
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            os.close(status_fd)
            raise
        finally:
            os.close(status_end)
        self._status_fd: int | None = status_fd
        self._pidfd = os.pidfd_open(self._popen.pid)
        streams.started()

    def relay_until_end(self, timeout: float | None) -> bool:
        """Relay the streams until the command has ended; return whether it did so within the timeout, in seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._duration_ns:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            self._relay_once(left)
        return True

    def _relay_once(self, timeout: float | None) -> None:
        relays = self._streams.relays()
        events = {self._pidfd: select.POLLIN}
        if self._status_fd is not None:
            events[self._status_fd] = select.POLLIN
        for relay in relays:
            descriptor, event = relay.awaits
            events[descriptor] = events.get(descriptor, 0) | event
        poll = select.poll()
        for descriptor, event in events.items():
            poll.register(descriptor, event)
        # Rounded up, so that the deadline has passed when poll returns for it.
        ready = dict(poll.poll(None if timeout is None else int(timeout * 1000) + 1))
        for relay in relays:
            # One that was ready may have been ended by the step of another.
            if relay.is_active and ready.get(relay.awaits[0], 0) & (relay.awaits[1] | select.POLLHUP | select.POLLERR):
                relay.step()
        if self._status_fd in ready:
            self._read_status()
        if self._pidfd in ready:
            self._duration_ns = time.monotonic_ns() - self._started

    def _read_status(self) -> None:
        assert self._status_fd is not None
        data = os.read(self._status_fd, 4096)
        self._status += data
        if not data:
            os.close(self._status_fd)
            self._status_fd = None

    def _init(self) -> int | None:
        """Return the pid of the sandbox's pid 1, None when there is none yet."""
        match = _CHILD_PID.search(self._status)
        return int(match[1]) if match else None

    def signal_command(self, number: int) -> bool:
        """Send a signal to what Ctrl-C would reach, and return whether it was there."""
        group = self._streams.foreground_group()
        try:
            os.killpg(group or self._command(), number)
        except (OSError, LookupError):
            return False
        return True

    def _command(self) -> int:
        """Return the pid, which is the process group too, of the command: the first child of pid 1 (proc(5))."""
        init = self._init()
        return int(Path(f"/proc/{init}/task/{init}/children").read_bytes().split()[0])

    def end(self) -> None:
        """Kill what is left of bubblewrap and of the sandbox, and wait until all of it is gone."""
        # Bubblewrap tells the pid as soon as there is one; nothing else would lead to it.
        poll = select.poll()
        while self._status_fd is not None and self._init() is None:
            poll.register(self._status_fd, select.POLLIN)
            if not poll.poll(1000):
                break
            self._read_status()
        os.kill(self._popen.pid, signal.SIGKILL)  # Popen.kill would reap it if it has ended.
        self._popen.returncode = self._reap(self._popen.pid)
        self._duration_ns = self._duration_ns or time.monotonic_ns() - self._started
        os.close(self._pidfd)
        while self._status_fd is not None:
            self._read_status()
        init = self._init()
        if init is not None:
            with contextlib.suppress(ChildProcessError):  # Bubblewrap has reaped it by itself.
                os.waitid(os.P_PID, init, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                os.kill(init, signal.SIGKILL)
                self._reap(init)

    def _reap(self, pid: int) -> int:
        _, status, usage = os.wait4(pid, 0)
        self._usages.append(usage)
        return os.waitstatus_to_exitcode(status)

    def result(self, *, timed_out: bool) -> Ended:
        """Return how the command ended. Raises SandboxError when it did not begin."""
        return Ended(
            exit_status=TIMEOUT_STATUS if timed_out else self._exit_status(),
            timed_out=timed_out,
            started_ns=self._started_ns,
            duration_ns=self._duration_ns,
            user_cpu_ns=int(sum(usage.ru_utime for usage in self._usages) * 1e9),
            system_cpu_ns=int(sum(usage.ru_stime for usage in self._usages) * 1e9),
            # Our own memory counts as that of the process that we started (getrusage(2): it was ours until execve).
            max_memory=self._usages[-1].ru_maxrss * 1024,
        )

    def _exit_status(self) -> int:
        match = _EXIT_CODE.search(self._status)
        if match:
            return int(match[1])
        if self._popen.returncode < 0:  # Somebody killed bubblewrap.
            return 128 - self._popen.returncode
        said = Path(self._streams.kept[-1]).read_text("utf-8", "replace")
        raise SandboxError(said.strip() or f"bubblewrap ended with status {self._popen.returncode}")


def _signal_of(interrupt: BaseException) -> int:
    if isinstance(interrupt, KeyboardInterrupt):
        return signal.SIGINT
    code = interrupt.code if isinstance(interrupt, SystemExit) else None
    if isinstance(code, int) and code - 128 in signal.valid_signals():
        return code - 128
    return signal.SIGTERM


@contextlib.contextmanager
def _adopting_orphans() -> Generator[None, None, None]:
    """Let us become the parent of pid 1 when bubblewrap ends, so that we can wait for it (prctl(2))."""
    libc = ctypes.CDLL(None)
    before = ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
