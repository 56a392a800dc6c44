"""The standard streams of a command: its output goes to our own streams at once and is kept in files as well.

Where our standard output is a terminal, the command gets a pseudo-terminal as its controlling terminal for all its
streams that are terminals, and what the user types goes to it. Where it is not, as in `acetate run … | less`, the
terminal belongs to whoever else reads it: the command then gets no controlling terminal, and a standard input that is
a terminal is handed on as it is, so that only the command's own reading takes anything from it; TIOCSTI asks for the
controlling terminal or CAP_SYS_ADMIN (ioctl_tty(2)), of which it has neither.
"""

import contextlib
import errno
import fcntl
import os
import select
import stat
from collections.abc import Callable, Mapping
from functools import partial
from typing import Self

from stages.linux import terminal

_CHUNK = 65536


class Relay:
    """Bytes on their way from one descriptor to another, and into a file; one step at a time, so that none blocks.

    source: a descriptor to read. end_source: what to call when nothing more is to be read from it.
    target: a descriptor to write. kept: the file's path or None.
    """

    def __init__(self, source: int, end_source: Callable[[], object], target: int, kept: str | None = None) -> None:
        """Begin with an empty file. Raises OSError."""
        self._source: int | None = source
        self._end_source = end_source
        self._target = target
        self._pending = memoryview(b"")
        self._kept = kept
        self._file: int | None = None
        if kept is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.open(kept, flags, 0o600)
        # poll(2) promises room for PIPE_BUF bytes in a pipe; only what never blocks may get more at a time.
        is_file = stat.S_ISREG(os.fstat(target).st_mode)
        self._slice = _CHUNK if is_file else select.PIPE_BUF

    @property
    def is_active(self) -> bool:
        """Whether there is anything to wait for."""
        return self._source is not None

    @property
    def awaits(self) -> tuple[int, int]:
        """The descriptor and the poll event that the next step waits for."""
        if self._pending:
            return self._target, select.POLLOUT
        assert self._source is not None
        return self._source, select.POLLIN

    def step(self) -> None:
        """Read or write once. Raises OSError when bytes would be lost."""
        if self._pending:
            self._write()
        else:
            self._read()

    def _read(self) -> None:
        assert self._source is not None
        try:
            data = os.read(self._source, _CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            # What a pseudo-terminal says when nobody has its other end any more.
            if error.errno != errno.EIO:
                raise
            data = b""
        if not data:
            self.end()
            return
        self._keep(data)
        self._pending = memoryview(data)

    def _keep(self, data: bytes) -> None:
        if self._file is None:
            return
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), self._kept) from error

    def _write(self) -> None:
        try:
            written = os.write(self._target, self._pending[: self._slice])
        except BlockingIOError:
            return
        except OSError as error:
            self.end()
            # Whoever read our output is gone: the command learns it as it would without us, by SIGPIPE or SIGHUP.
            if error.errno in {errno.EPIPE, errno.EIO, errno.ECONNRESET}:
                return
            raise OSError(error.errno, os.strerror(error.errno or 0), f"/dev/fd/{self._target}") from error
        self._pending = self._pending[written:]

    def drain(self) -> None:
        """Relay what is still in the source, which nobody writes to any more, and close."""
        while self.is_active:
            descriptor, event = self.awaits
            poll = select.poll()
            poll.register(descriptor, event)
            if not poll.poll(None if self._pending else 0):
                break
            self.step()
        self.close()

    def end(self) -> None:
        """Drop what is not written yet, and end the source."""
        self._pending = memoryview(b"")
        if self._source is not None:
            self._source = None
            self._end_source()

    def close(self) -> None:
        """End the source and close the file."""
        self.end()
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Streams:
    """The three standard streams of one command, for the time that this is entered.

    stdin, stdout, stderr: descriptors for the command. kept: the files that hold the output; the first that of
    standard output, and of standard error too if both go to the same place, otherwise the second.
    terminal_stream: which of the streams is to be the command's controlling terminal, None for none.
    """

    def __init__(self, folder: str) -> None:
        """Keep the folder that the files go to, as `terminal` or `stdout`, and `stderr`."""
        self._folder = folder
        self._cleanup = contextlib.ExitStack()
        self._command_ends: list[int] = []
        self._outputs: list[Relay] = []
        self._keyboard: Relay | None = None
        self._terminals: list[terminal.PseudoTerminal] = []
        self._settings: terminal.Settings | None = None
        self.terminal_stream: int | None = None
        self.kept: list[str] = []
        self.stdin = self.stdout = self.stderr = -1

    def __enter__(self) -> Self:
        """Make pipes and pseudo-terminals, put our terminal in raw mode. Raises OSError."""
        with self._cleanup:
            self._open()
            self._cleanup = self._cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Close everything, and leave our terminal as it was."""
        self._cleanup.close()

    def _open(self) -> None:
        self._fill_closed()
        interactive = os.isatty(1)
        self.stdout = self._open_output(1, "terminal" if interactive else "stdout", interactive=interactive)
        self.stderr = self.stdout if os.path.sameopenfile(1, 2) else self._open_output(2, "stderr")
        self.stdin = 0
        user = 0 if os.isatty(0) else 1
        if interactive:
            self.terminal_stream = user
            if user == 0:
                self.stdin = self.stdout
            if fcntl.fcntl(user, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY:
                self._keyboard = Relay(user, lambda: None, self._terminals[0].controller)
        if os.isatty(user):
            self._settings = terminal.Settings(user, self._terminals, raw=self._keyboard is not None)
            self._cleanup.enter_context(self._settings)

    def _fill_closed(self) -> None:
        """Let none of 0, 1 and 2 be closed, or what is opened next would be taken for a standard stream."""
        for descriptor in (0, 1, 2):
            try:
                os.fstat(descriptor)
            except OSError:
                self._cleanup.callback(os.close, os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))

    def _open_output(self, target: int, name: str, *, interactive: bool = False) -> int:
        """Make the pipe or terminal whose output goes to our target, and return the command's end."""
        kept = os.path.join(self._folder, name)
        if os.isatty(target):
            pseudo = terminal.PseudoTerminal(target, interactive=interactive)
            self._cleanup.callback(pseudo.close)
            self._terminals.append(pseudo)
            source, end_source, command = pseudo.controller, partial(self._hang_up, pseudo), pseudo.command
        else:
            source, command = os.pipe()
            os.set_blocking(source, False)
            end_source = partial(os.close, source)
            self._command_ends.append(command)
            self._cleanup.callback(self.started)
        relay = Relay(source, end_source, target, kept)
        self._cleanup.callback(relay.close)
        self._outputs.append(relay)
        self.kept.append(kept)
        return command

    def _hang_up(self, pseudo: terminal.PseudoTerminal) -> None:
        pseudo.close()
        if self._keyboard and pseudo is self._terminals[0]:
            self._keyboard.end()

    def session_argv(self, environment: Mapping[str, str]) -> list[str]:
        """Return the words that, put before the command, give it its own session, with its terminal."""
        return terminal.session_argv(self.terminal_stream, environment)

    def started(self) -> None:
        """Close our copies of the pipes' ends that the command has, once it has been started."""
        while self._command_ends:
            os.close(self._command_ends.pop())

    def foreground_group(self) -> int | None:
        """Return the process group that has the command's controlling terminal, None without one."""
        if self.terminal_stream is None or not self._terminals[0].is_open:
            return None
        return self._terminals[0].foreground_group()

    def relays(self) -> list[Relay]:
        """Return the relays that have something to wait for now."""
        active = list(self._outputs)
        if self._keyboard and self._settings and self._settings.in_foreground:
            active.append(self._keyboard)
        return [relay for relay in active if relay.is_active]

    def drain(self) -> None:
        """Relay the rest of the output, when nobody is left to write more; waits for whoever reads ours."""
        self.started()
        for pseudo in self._terminals:
            pseudo.close_command()
        for relay in self._outputs:
            relay.drain()
