"""The command's standard streams: pipes, files and terminals, real ones."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from stages.linux import bubblewrap, terminal
from stages.linux.streams import Relay
from tests.stages import running

MEGABYTES = 10


@pytest.fixture(params=["root", "unprivileged"])
def project(request: pytest.FixtureRequest) -> Iterator[running.Project]:
    """Give a project of each kind of user; no process of its run is left."""
    if bubblewrap.is_missing():
        pytest.skip("bubblewrap is not installed")
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("only root can run as root")
    with running.project(request.param) as made:
        yield made
        assert running.processes(str(made.base)) == []


def spawn(words: list[str], **variables: str) -> "pexpect.spawn[str]":
    """Start a program in a terminal of 31 lines and 97 columns."""
    environment = os.environ | {"TERM": "xterm", "PS1": "$ "} | variables
    child = pexpect.spawn(
        words[0], words[1:], encoding="utf-8", timeout=10, dimensions=(31, 97), env=environment, echo=False
    )
    child.delaybeforesend = None
    return child


def piped(project: running.Project, argv: list[str], redirection: str, **request: Any) -> list[str]:
    """Return the words that run a command with some streams redirected by a shell."""
    return ["bash", "-c", f'"$@" {redirection}', "bash", *project.command(argv, **request)]


def finish(child: "pexpect.spawn[str]") -> str:
    """Wait for the end of a program in a terminal, and return what it said since the last expectation."""
    child.expect(pexpect.EOF)
    child.close()
    return str(child.before)


def status(project: running.Project) -> int:
    """Return the command's exit status."""
    executed = project.executed()
    assert executed is not None
    return int(executed["exit_status"])


def test_streams_are_terminals(project: running.Project) -> None:
    """In a terminal the command has one on all three streams, and as its controlling terminal; one file keeps all."""
    child = spawn(project.command(["sh", "-c", "test -t 0 -a -t 1 -a -t 2 && echo yes >/dev/tty; echo err >&2"]))
    assert finish(child).split() == ["yes", "err"]
    executed = project.executed()
    assert executed is not None
    assert (executed["stdout"], executed["stderr"]) == (str(project.output / "terminal"), None)
    assert (project.output / "terminal").read_bytes() == b"yes\r\nerr\r\n"


def test_window_size(project: running.Project) -> None:
    """The command's terminal has the size of the user's, and follows it."""
    child = spawn(
        project.command(["sh", "-c", "trap 'stty size; exit' WINCH; stty size; while :; do sleep 0.05; done"])
    )
    child.expect("31 97")
    child.setwinsize(20, 60)
    child.expect("20 60")
    finish(child)


def test_control_c_reaches_command(project: running.Project) -> None:
    """Ctrl-C in a terminal interrupts the command alone, which may go on and end as it likes."""
    child = spawn(project.command(["sh", "-c", "trap 'echo caught' INT; echo begun; sleep 99; echo end; exit 5"]))
    child.expect("begun")
    child.sendintr()
    child.expect("caught")
    child.expect("end")
    finish(child)
    assert status(project) == 5


def test_signal_to_us_reaches_command_in_terminal(project: running.Project) -> None:
    """A SIGINT to us lets a command in a terminal clean up too, and the terminal is as before."""
    shell = 'stty -g; "$@"; stty -g'
    script = "trap 'echo cleaned; exit 3' INT; echo begun; while :; do sleep 0.05; done"
    child = spawn(["sh", "-c", shell, "sh", *project.command(["sh", "-c", script])])
    child.expect(r"(\S+:\S+:\S+)\r\n")
    settings = child.match[1]
    child.expect("begun")
    pid = int(subprocess.check_output(["pgrep", "-f", f"^{sys.executable} .*running.py {project.base}"]))
    os.kill(pid, signal.SIGINT)
    child.expect("cleaned")
    assert settings in finish(child)


def test_interactive_python(project: running.Project) -> None:
    """An interactive interpreter reads lines, edits them, and is interrupted by Ctrl-C without ending."""
    child = spawn(project.command(["/usr/bin/python3", "-q"]))
    child.expect(">>> ")
    child.sendline("6 * 7")
    child.expect("42")
    child.expect(">>> ")
    child.sendline("import time; time.sleep(99)")
    time.sleep(0.3)
    child.sendintr()
    child.expect("KeyboardInterrupt")
    child.expect(">>> ")
    child.sendline("import os; os._exit(9)")
    finish(child)
    assert status(project) == 9


def test_job_control(project: running.Project) -> None:
    """A shell in the sandbox can stop a job, list it and continue it."""
    child = spawn(project.command(["bash", "--norc", "--noediting", "-i"]))
    child.expect(r"\$ ")
    child.sendline("cat")
    child.sendline("hello")
    child.expect("hello")
    time.sleep(0.1)
    child.send("\x1a")
    child.expect("Stopped")
    child.sendline("fg")
    child.expect("cat")
    child.sendeof()
    child.expect(r"\$ ")
    child.sendline("exit 4")
    said = finish(child)
    assert "no job control" not in said
    assert status(project) == 4


def test_full_screen_editor(project: running.Project) -> None:
    """An editor works: keys arrive one by one, and the file is written in the overlay."""
    child = spawn(project.command(["sh", "-c", "vi -u NONE -n file; cat file"]))
    child.expect(r"\x1b\[")
    child.send("ihello\x1b:wq\r")
    assert "hello" in finish(child)
    assert status(project) == 0
    assert not (project.root / "file").exists()


@pytest.mark.parametrize("odd", [{}, {"odd.name": "x y"}])
def test_controlling_terminal_without_terminal_as_stdin(project: running.Project, odd: dict[str, str]) -> None:
    """With another standard input, the terminal of standard output is the controlling one; the input is intact."""
    script = "read line; echo got $line; env | grep odd.name; read typed </dev/tty; echo typed $typed; exit 6"
    child = spawn(piped(project, ["bash", "-c", script], "<<!\nfrom-stdin\n!"), **odd)
    child.expect("got from-stdin")
    if odd:
        child.expect("odd.name=x y")
    child.sendline("keys")
    child.expect("typed keys")
    finish(child)
    assert status(project) == 6


def test_keyboard_is_left_to_the_end_of_a_pipeline(project: running.Project) -> None:
    """With standard output in a pipe, what is typed is not taken from the program at its end."""
    words = piped(
        project, ["sh", "-c", "test -t 2 && echo ready"], "| { read a; echo $a; read b </dev/tty; echo typed $b; }"
    )
    child = spawn(words)
    child.expect("ready")
    child.sendline("keys")
    child.expect("typed keys")
    finish(child)


def test_command_reads_terminal_though_its_output_is_redirected(project: running.Project) -> None:
    """With standard output in a file, the command can still ask at its standard input; it has no /dev/tty."""
    script = "test -t 0 && echo ready >&2; read a; echo got $a >&2; echo x >/dev/tty || exit 8"
    child = spawn(piped(project, ["bash", "-c", script], ">/dev/null"))
    child.expect("ready")
    child.sendline("keys")
    child.expect("got keys")
    finish(child)
    assert status(project) == 8


TIOCSTI = """
import fcntl, os, sys, termios
for fd in 0, 2:
    try:
        for character in b"pushed\\n":
            fcntl.ioctl(fd, termios.TIOCSTI, bytes([character]))
    except OSError:
        pass
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize("redirection", ["", ">/dev/null", "</dev/null"])
def test_input_queue_of_the_user_stays(project: running.Project, redirection: str) -> None:
    """What the command pushes into its terminal's input queue (TIOCSTI) never reaches the user's terminal."""
    words = project.command(["/usr/bin/python3", "-c", TIOCSTI])
    after = "stty -icanon min 0 time 3; echo left: $(cat)."
    child = spawn(["sh", "-c", f'"$@" {redirection}; {after}', "sh", *words])
    child.expect("done")
    child.expect("left: ?(.*)[.]")
    assert not child.match[1]
    finish(child)


def test_terminal_is_restored_by_error(project: running.Project) -> None:
    """The terminal has its settings back when execute raises."""
    tools = project.base / "tools"
    tools.mkdir()
    (tools / "bwrap").write_text("#!/bin/sh\nexit 1\n")
    (tools / "bwrap").chmod(0o755)
    words = ["sh", "-c", 'stty -g; "$@"; echo; stty -g', "sh", *project.command(["true"])]
    child = spawn(words, PATH=f"{tools}:{os.environ['PATH']}")
    child.expect(r"(\S+:\S+:\S+)\r\n")
    before = child.match[1]
    child.expect("UsageError")
    assert before in finish(child)


def test_background_job_is_not_stopped(project: running.Project) -> None:
    """A run in the background of a shell's terminal leaves the terminal alone and ends by itself."""
    words = project.command(["sh", "-c", "sleep 0.3; echo from-background"])
    quoted = " ".join(f"'{word}'" for word in words)
    child = spawn(["bash", "--norc", "--noediting", "-i"])
    child.expect(r"\$ ")
    child.sendline(quoted + " & stty -a | grep -o ' icanon'")
    child.expect(" icanon")
    child.expect("from-background")
    child.sendline("wait; jobs; echo over $?")
    child.expect("over 0")
    child.sendline("exit")
    finish(child)
    assert status(project) == 0


def test_large_output_is_intact(project: running.Project) -> None:
    """Megabytes on both streams at once arrive and are kept byte for byte."""
    script = f"import os, sys\nfor i in range({MEGABYTES}0000): os.write(int(sys.argv[1]), b'%99d\\n' % i)"
    result = project.run(["bash", "-c", '/usr/bin/python3 -c "$1" 1 & /usr/bin/python3 -c "$1" 2; wait', "sh", script])
    expected = b"".join(b"%99d\n" % i for i in range(MEGABYTES * 10000))
    assert result.stdout == expected
    assert result.stderr == expected
    assert (project.output / "stdout").read_bytes() == expected
    assert (project.output / "stderr").read_bytes() == expected


def test_order_of_joined_streams(project: running.Project) -> None:
    """With both streams in one pipe, the order of what is written is kept, in one file."""
    script = "i=0; while [ $i -lt 200 ]; do echo $i; i=$((i+1)); echo $i >&2; i=$((i+1)); done"
    words = piped(project, ["sh", "-c", script], "2>&1")
    expected = [b"%d" % i for i in range(200)]
    assert subprocess.run(words, capture_output=True, check=True).stdout.split()[:200] == expected
    assert (project.output / "stdout").read_bytes().split()[:200] == expected
    executed = project.executed()
    assert executed is not None
    assert executed["stderr"] is None


def test_reader_that_goes_away(project: running.Project) -> None:
    """When the reader of our output ends, the command gets SIGPIPE, as natively, and the run goes on to its end."""
    done = subprocess.run(piped(project, ["yes"], "| head -n 1"), capture_output=True, check=True, timeout=20)
    assert done.stdout == b"y\n"
    assert status(project) == 128 + signal.SIGPIPE


def test_non_blocking_output(project: running.Project) -> None:
    """Standard output that somebody made non-blocking loses nothing."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    words = project.command(["seq", "100000"])
    with subprocess.Popen(words, stdout=writer) as process, os.fdopen(reader, "rb") as output:
        os.close(writer)
        time.sleep(0.3)
        assert output.read() == b"".join(b"%d\n" % i for i in range(1, 100001))
        assert process.wait(10) == 0


def test_slow_reader_does_not_delay_timeout(project: running.Project) -> None:
    """A reader that does not read holds up the output, not the timeout."""
    words = piped(project, ["yes"], "| { sleep 1.5; cat >/dev/null; }", timeout=0.3)
    subprocess.run(words, check=True, timeout=20)
    executed = project.executed()
    assert executed is not None
    assert executed["timed_out"]
    assert executed["command_duration_ns"] < 1.2e9


CLOSED = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from stages.linux.streams import Streams
for word in sys.argv[3:]:
    os.close(int(word))
with Streams(sys.argv[2]) as streams:
    script = "echo out; echo err >&2; read line"
    subprocess.run(["sh", "-c", script], stdin=streams.stdin, stdout=streams.stdout, stderr=streams.stderr)
    streams.drain()
"""


@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """Standard streams that are closed are as good as /dev/null, and the output is kept."""
    words = [sys.executable, "-c", CLOSED, str(running.PROJECT), str(tmp_path), *closed]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    # Two closed ones become the same /dev/null.
    joined = {"stdout": "out\nerr\n"} if closed == "012" else {"stdout": "out\n", "stderr": "err\n"}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == joined


def test_relay_keeps_all_and_stops_with_its_reader(tmp_path: Path) -> None:
    """A relay whose reader has gone ends its source, without an error."""
    source, feed = os.pipe()
    reader, target = os.pipe()
    os.set_blocking(source, False)
    relay = Relay(source, lambda: os.close(source), target, str(tmp_path / "kept"))
    os.write(feed, b"abc")
    os.close(reader)
    relay.step()
    assert relay.is_active
    relay.step()
    assert not relay.is_active
    relay.close()
    assert (tmp_path / "kept").read_bytes() == b"abc"
    with pytest.raises(BrokenPipeError):
        os.write(feed, b"x")
    os.close(feed)
    os.close(target)


def test_relay_tells_of_a_full_disk(tmp_path: Path) -> None:
    """A relay that can't pass bytes on says so."""
    source, feed = os.pipe()
    os.write(feed, b"abc")
    full = os.open("/dev/full", os.O_WRONLY)
    relay = Relay(source, lambda: os.close(source), full, str(tmp_path / "kept"))
    relay.step()
    with pytest.raises(OSError, match="No space left") as raised:
        relay.step()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, f"/dev/fd/{full}")
    relay.close()
    os.close(feed)
    os.close(full)


def test_session_argv() -> None:
    """A session of its own takes setsid; only a terminal other than standard input takes a shell besides."""
    assert terminal.session_argv(None, {}) == ["setsid"]
    assert terminal.session_argv(0, {"a.b": "c"}) == ["setsid", "-c"]
    assert terminal.session_argv(1, {"a.b": "c", "D": "e"})[-2:] == ["env", "a.b=c"]
    assert terminal.session_argv(2, {"D": "e"})[-1] == "sh"
