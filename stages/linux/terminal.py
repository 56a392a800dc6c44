"""Pseudo-terminals that stand between the user's terminal and a command.

The command never gets the user's terminal itself: what it pushes into the input queue of its terminal (TIOCSTI,
ioctl_tty(2)) or changes in its settings stays there, and is gone when it ends.
"""

import contextlib
import os
import re
import signal
import termios
import threading
import tty
from collections.abc import Mapping, Sequence
from typing import Any, Self

_SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class PseudoTerminal:
    """A pseudo-terminal with the settings and window size of one of our own terminals.

    user: the descriptor of our terminal. controller: our end. command: the end for the command; it stays open until
    `close_command`, so that the command may close its terminal and open it again.
    """

    def __init__(self, user: int, *, interactive: bool) -> None:
        """Make it.

        interactive: whether ours is to be put in raw mode, so that this one alone does the processing.
        """
        self.user = user
        self.controller, self.command = os.openpty()
        self.is_open = True
        os.set_blocking(self.controller, False)
        settings = termios.tcgetattr(user)
        if not interactive:
            # Our terminal processes the output already.
            settings[1] &= ~termios.OPOST
        termios.tcsetattr(self.command, termios.TCSANOW, settings)
        self.copy_window_size()

    def copy_window_size(self) -> None:
        """Give it the window size of our terminal; the kernel sends SIGWINCH to those who use it when that changed."""
        if self.is_open:
            with contextlib.suppress(termios.error):
                termios.tcsetwinsize(self.controller, termios.tcgetwinsize(self.user))

    def foreground_group(self) -> int | None:
        """Return the process group in its foreground, as a pid of our own namespace; None when there is none."""
        try:
            return os.tcgetpgrp(self.controller) or None
        except OSError:
            return None

    def close_command(self) -> None:
        """Close our copy of the command's end, so that reading the other tells the end."""
        if self.command >= 0:
            os.close(self.command)
            self.command = -1

    def close(self) -> None:
        """Close both ends; what still uses the terminal gets SIGHUP."""
        self.close_command()
        if self.is_open:
            self.is_open = False
            os.close(self.controller)


class Settings:
    """Our terminal while a command runs: in raw mode if wanted, and at the end as it was.

    A job in the background must not touch the terminal: SIGTTOU would stop it, and the settings are those of another
    program. So raw mode waits for SIGCONT, which a shell sends to the job that it puts into the foreground. Signal
    handlers are Python's, which can be set in the main thread only; in any other the state of the beginning stays.

    in_foreground: whether what is typed is for us.
    """

    def __init__(self, user: int, followers: Sequence[PseudoTerminal], *, raw: bool) -> None:
        """Keep the descriptor of our terminal, and the pseudo-terminals that follow its window size."""
        self._user = user
        self._followers = followers
        self._raw = raw
        self._before = termios.tcgetattr(user)
        self._handlers: dict[signal.Signals, Any] = {}
        self.in_foreground = False

    def __enter__(self) -> Self:
        """Set raw mode if it is wanted and we are in the foreground."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGWINCH, signal.SIGCONT):
                self._handlers[number] = signal.signal(number, self._follow)
        self._enter_foreground()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the terminal back as it was."""
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if is_foreground(self._user):
            with contextlib.suppress(termios.error):  # It may be gone.
                termios.tcsetattr(self._user, termios.TCSANOW, self._before)

    def _follow(self, number: int, _frame: object) -> None:
        if number == signal.SIGCONT:
            self._enter_foreground()
        for follower in self._followers:
            follower.copy_window_size()

    def _enter_foreground(self) -> None:
        self.in_foreground = is_foreground(self._user)
        if self._raw and self.in_foreground:
            with contextlib.suppress(termios.error):
                tty.setraw(self._user, termios.TCSANOW)


def is_foreground(user: int) -> bool:
    """Return whether our process group is in the foreground of the terminal."""
    try:
        return os.tcgetpgrp(user) == os.getpgrp()
    except OSError:
        return False


def session_argv(terminal_stream: int | None, environment: Mapping[str, str]) -> list[str]:
    """Return the words that, put before a command, run it in a session and process group of its own.

    terminal_stream: which of its standard streams is to be its controlling terminal, None for no such terminal.
    setsid(1) takes standard input only; any other is made so by opening it anew (credentials(7), tty_ioctl(4)), for
    which it takes a shell. A shell may drop environment variables that can't be variables of its own, so that env(1)
    sets those once more.
    """
    if terminal_stream is None:
        return ["setsid"]
    if terminal_stream == 0:
        return ["setsid", "-c"]
    dropped = [f"{name}={value}" for name, value in environment.items() if not _SHELL_NAME.fullmatch(name)]
    again = ["env", *dropped] if dropped else []
    return ["setsid", "sh", "-c", f': <>/proc/self/fd/{terminal_stream}; exec "$@"', "sh", *again]
