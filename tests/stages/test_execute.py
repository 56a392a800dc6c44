"""What a command sees, can do and leaves in the sandbox, with real namespaces, overlays and bubblewrap."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.linux import bubblewrap, namespaces
from tests.stages import running

pytestmark = pytest.mark.skipif(bubblewrap.is_missing(), reason="bubblewrap is not installed")
IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root may do this")


@pytest.fixture(params=["root", "unprivileged"])
def project(request: pytest.FixtureRequest) -> Iterator[running.Project]:
    """Give a project of each kind of user; no process of its run is left."""
    if request.param == "root" and not IS_ROOT:
        pytest.skip("only root can run as root")
    with running.project(request.param) as made:
        yield made
        assert running.processes(str(made.base)) == []


@pytest.fixture
def root_project() -> Iterator[running.Project]:
    """Give a project of root."""
    with running.project("root") as made:
        yield made
        assert running.processes(str(made.base)) == []


def manifest(result: running.Result) -> dict[str, Any]:
    """Return the manifest, which must be there."""
    assert result.executed is not None, result.stderr.decode()
    return result.executed


def shell(project: running.Project, script: str, **options: Any) -> str:
    """Run a script that must succeed, and return what it said."""
    result = project.run(["sh", "-c", script], **options)
    assert manifest(result)["exit_status"] == 0, result.stderr.decode()
    return result.stdout.decode(errors="surrogateescape")


def attempt(project: running.Project, script: str, **options: Any) -> str:
    """Run a script that must fail, and return its complaint."""
    result = project.run(["sh", "-c", script], **options)
    assert manifest(result)["exit_status"] != 0, result.stdout.decode()
    return result.stderr.decode()


def wait_for(path: Path) -> None:
    """Wait until the file has content."""
    end = time.monotonic() + 10
    while not path.exists() or not path.read_bytes():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_status_and_output(project: running.Project) -> None:
    """The command's status is told, and its output goes on and is kept, for the owner only."""
    result = project.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    executed = manifest(result)
    assert (executed["exit_status"], executed["signal"], executed["timed_out"]) == (7, None, False)
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    kept = Path(executed["stdout"]), Path(executed["stderr"])
    assert [path.read_bytes() for path in kept] == [b"out\n", b"err\n"]
    assert kept == (project.output / "stdout", project.output / "stderr")
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o600}


def test_arguments_arrive_as_they_are(project: running.Project) -> None:
    """Blanks, quotes, newlines, empty arguments and leading dashes reach the command."""
    words = ["--", "-n", "", "a b", "'\"", "x\ny", "A=B"]
    assert project.run(["printf", "[%s]", *words]).stdout.decode() == "".join(f"[{word}]" for word in words)


def test_signal(project: running.Project) -> None:
    """A command that a signal ended has the status and the signal that a shell tells."""
    executed = manifest(project.run(["sh", "-c", "kill -SEGV $$"]))
    assert (executed["exit_status"], executed["signal"]) == (128 + signal.SIGSEGV, "SIGSEGV")


def test_missing_command(project: running.Project) -> None:
    """A command that does not exist has status 127 and a message that names it."""
    result = project.run(["no-such-command"], environment={"PATH": "/usr/bin:/bin"})
    assert manifest(result)["exit_status"] == 127
    assert b"no-such-command: No such file" in result.stderr


def test_command_that_is_not_executable(project: running.Project) -> None:
    """A file that can't be executed has status 126 and a message that names it."""
    result = project.run(["/etc/passwd"])
    assert manifest(result)["exit_status"] == 126
    assert b"/etc/passwd: Permission denied" in result.stderr


def test_timeout_ends_everything(project: running.Project) -> None:
    """A daemon that ignores SIGTERM does not outlive the timeout, and the status is that of timeout(1)."""
    marker = f"{project.base}-daemon"
    script = f"trap '' TERM HUP INT; (setsid sh -c 'sleep 99; : {marker}' &) ; echo begun; sleep 99"
    executed = manifest(project.run(["sh", "-c", script], timeout=0.4))
    assert (executed["exit_status"], executed["timed_out"], executed["signal"]) == (124, True, None)
    assert 0.4e9 <= executed["command_duration_ns"] < 2e9
    assert Path(executed["stdout"]).read_text() == "begun\n"
    assert running.processes(marker) == []


def test_background_process_ends_with_command(project: running.Project) -> None:
    """A process left in the background, which has the output open, neither delays the end nor outlives it."""
    marker = f"{project.base}-background"
    result = project.run(["sh", "-c", f"sh -c 'sleep 99; : {marker}' & echo done"])
    assert manifest(result)["command_duration_ns"] < 5e9
    assert result.stdout == b"done\n"
    assert running.processes(marker) == []


def test_no_descriptor_leaks(project: running.Project) -> None:
    """The command has its three standard streams and no other descriptor."""
    script = """
import os
for descriptor in range(256):
    try:
        os.fstat(descriptor)
        print(descriptor)
    except OSError:
        pass
"""
    assert project.run(["/usr/bin/python3", "-c", script]).stdout.split() == [b"0", b"1", b"2"]


def test_tmp_is_private(project: running.Project) -> None:
    """/tmp is empty, open to all, writable, named by TMPDIR, and not the real one."""
    name = f"{project.base.name}-private"
    script = f"ls -A /tmp; stat -c %a /tmp; echo x > /tmp/{name}; mktemp"
    mode, temporary = shell(project, script, environment={"TMPDIR": "/var/tmp"}).split()
    assert (mode, temporary.startswith("/tmp/")) == ("1777", True)
    assert not Path("/tmp", name).exists()


def test_outside_is_read_only(project: running.Project) -> None:
    """Beside the roots nothing can be written, not even what belongs to the caller."""
    project.make_root(project.base / "beside")
    script = f"! touch {project.base}/beside/x && ! touch /var/tmp/x && ! touch ~/x && ! chmod 700 {project.base}"
    assert shell(project, script, environment={"HOME": str(project.base)}) == ""


@needs_root
def test_other_mounts_are_read_only(project: running.Project) -> None:
    """A file system mounted elsewhere, writable for all, is read-only inside."""
    before = (
        "mount -t tmpfs acetate /mnt; chmod 1777 /mnt; mkdir /mnt/x; mount -t tmpfs acetate /mnt/x; chmod 777 /mnt/x"
    )
    assert shell(project, "! touch /mnt/a && ! touch /mnt/x/a && ls /mnt", before=before) == "x\n"


def test_live_tree_stays(project: running.Project) -> None:
    """What the command writes is in the overlay, not in the live tree."""
    (project.root / "old").write_text("old")
    project.own(project.root / "old")
    assert shell(project, "echo new > old; echo x > added; cat old") == "new\n"
    assert [path.name for path in project.root.iterdir()] == ["old"]
    assert (project.root / "old").read_text() == "old"


def test_runs_are_hidden(project: running.Project) -> None:
    """The folder of all runs is empty and read-only inside."""
    (project.runs / "overlay-0").mkdir()
    script = f"ls -A {project.runs}; ! touch {project.runs}/x && ! mkdir {project.runs}/overlay-1"
    assert shell(project, script) == ""


@pytest.mark.parametrize("parent", ["{base}/cache/ollmchat", "/dev/shm", "/tmp"])
def test_root_in_masked_folder(project: running.Project, parent: str) -> None:
    """A root is there and writable even if it lies in a folder that is masked."""
    root = Path(parent.format(base=project.base), project.base.name + "-root")
    project.make_root(root)
    try:
        assert shell(project, "pwd; echo x > y; cat y", roots=[str(root)]).splitlines() == [str(root), "x"]
        assert list(root.iterdir()) == []
    finally:
        shutil.rmtree(root)


def test_two_roots(project: running.Project) -> None:
    """Each root is writable at its own path, and the first is the working folder."""
    other = project.base / "other"
    project.make_root(other)
    script = f"pwd; echo $PWD; touch a {other}/b; ls {other}"
    assert shell(project, script, roots=[str(project.root), str(other)]).split() == [str(project.root)] * 2 + ["b"]
    assert list(other.iterdir()) == []


def test_root_of_any_name(project: running.Project) -> None:
    """A root's name may hold any byte."""
    root = os.fsdecode(os.fsencode(project.base) + b"/a\xff b,c:\\\nd")
    project.make_root(Path(root))
    assert shell(project, "pwd; touch x", roots=[root]) == root + "\n"


def test_no_network(project: running.Project) -> None:
    """Without network=True the command reaches neither a port nor an abstract socket of the host."""
    check_network(project, network=False)


def test_network(project: running.Project) -> None:
    """With network=True the command reaches both."""
    check_network(project, network=True)


def check_network(project: running.Project, *, network: bool) -> None:
    """Connect from inside to listeners outside."""
    abstract = f"\0{project.base}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(abstract)
        local.listen()
        script = f"""
import socket
for family, address in ((socket.AF_INET, {server.getsockname()!r}), (socket.AF_UNIX, {abstract!r})):
    try:
        socket.socket(family).connect(address)
        print("reached")
    except OSError:
        print("refused")
"""
        result = project.run(["/usr/bin/python3", "-c", script], network=network)
    assert result.stdout.decode().split() == ["reached" if network else "refused"] * 2


def test_ids_are_the_callers(project: running.Project) -> None:
    """User and group are the caller's, and what the command makes belongs to it."""
    expected = "0:0" if project.user == "root" else f"{running.UNPRIVILEGED}:{running.UNPRIVILEGED}"
    assert not IS_ROOT or shell(project, "echo $(id -u):$(id -g); touch x; stat -c %u:%g x").split() == [expected] * 2


def test_processes_outside_are_out_of_sight(project: running.Project) -> None:
    """The command sees no process but the sandbox's."""
    assert int(shell(project, "ls /proc | grep -c '^[0-9]'")) <= 5


def test_stdin_passes_through(project: running.Project) -> None:
    """Standard input that is no terminal is the caller's own."""
    assert project.run(["wc", "-c"], stdin=b"x\0y" * 100000).stdout == b"300000\n"


def test_environment_passes_through(project: running.Project) -> None:
    """The command has its caller's environment, odd names too, and nothing of Acetate's."""
    variables = {"PLAIN": "a b", "odd.name%%": "c\nd"}
    said = project.run(["env", "-0"], environment=variables).stdout.decode().split("\0")
    assert {f"{name}={value}" for name, value in variables.items()} <= set(said)
    assert not [line for line in said if line.startswith("ACETATE")]


def test_usage_is_accounted(project: running.Project) -> None:
    """CPU time and memory are those of what the command started, background processes included."""
    burn = "import time; x = bytearray(100 << 20)\nwhile time.process_time() < 0.3: pass"
    executed = manifest(project.run(["sh", "-c", f"/usr/bin/python3 -c '{burn}' & wait"]))
    assert 0.3e9 <= executed["user_cpu_ns"] + executed["system_cpu_ns"] < 3e9
    assert 100 << 20 <= executed["max_memory"] < 200 << 20
    small = manifest(project.run(["true"]))
    assert small["max_memory"] < 10 << 20
    assert abs(small["command_started_ns"] - time.time_ns()) < 60e9


HOSTILE = """
import ctypes, os, subprocess
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open("/etc", os.O_RDONLY)
handle = ctypes.create_string_buffer(8 + 128)
ctypes.cast(handle, ctypes.POINTER(ctypes.c_uint))[0] = 128
mount_id = ctypes.c_int()
if libc.name_to_handle_at(fd, b"", handle, ctypes.byref(mount_id), 0x1000) == 0:
    assert libc.open_by_handle_at(fd, handle, os.O_RDONLY) == -1, "opened by handle"
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
assert libc.mount(b"none", b"/", None, MS_REMOUNT | MS_BIND, None) == -1, "remounted"
assert libc.mount(b"none", b"/", None, MS_REMOUNT, None) == -1, "remounted"
assert libc.mount(b"acetate", b"/mnt", b"tmpfs", 0, None) == -1, "mounted"
assert libc.umount2(os.environ["HIDDEN"].encode(), 2) == -1, "unmasked"
try:
    open("/proc/sys/kernel/domainname", "w").write("x")
    raise AssertionError("sysctl set")
except OSError:
    pass
"""


def test_mounts_cannot_be_changed(project: running.Project) -> None:
    """No mount, remount, unmount, file handle or sysctl opens what is closed, for root neither."""
    result = project.run(["/usr/bin/python3", "-c", HOSTILE], environment={"HIDDEN": str(project.runs)})
    assert manifest(result)["exit_status"] == 0, result.stderr.decode()


def test_mounts_cannot_be_changed_from_inner_user_namespace(project: running.Project) -> None:
    """Nor does a user namespace that the command makes for itself, in which it has all capabilities."""
    script = 'unshare --user --map-root-user --mount /usr/bin/python3 -c "$1"'
    hostile = HOSTILE.replace('assert libc.mount(b"acetate", b"/mnt", b"tmpfs", 0, None) == -1, "mounted"\n', "")
    result = project.run(["sh", "-c", script, "sh", hostile], environment={"HIDDEN": str(project.runs)})
    assert manifest(result)["exit_status"] == 0, result.stderr.decode()


@needs_root
def test_kernel_settings_of_root_are_read_only(root_project: running.Project) -> None:
    """Root's own files in /proc that set the kernel are read-only, and no new /proc without that can be mounted."""
    setting = "/proc/sys/kernel/core_pattern"
    script = f"cat {setting} > x; ! cat x > {setting} && ! sh -c 'echo h > /proc/sysrq-trigger'"
    assert shell(root_project, script) == ""
    inner = (
        f'cat x; unshare --user --map-root-user --pid --fork --mount sh -c "mount -t proc p /proc && cat x > {setting}"'
    )
    assert attempt(root_project, f"cat {setting} > x; {inner}")


@needs_root
def test_root_may_do_what_installing_needs(root_project: running.Project) -> None:
    """Root can still give files away, make device nodes, set file capabilities and become another user."""
    script = """
    touch a && chown 5:6 a && chmod 6755 a && mknod n c 1 3 && cp /bin/true t && setcap cap_net_raw+ep t
    stat -c %u:%g:%a a; getcap t; setpriv --reuid 5 --clear-groups id -u; ! cat n"""
    assert shell(root_project, script).split() == ["5:6:6755", "t", "cap_net_raw=ep", "5"]


@needs_root
def test_setuid_has_no_effect() -> None:
    """A setuid program of root does not make an unprivileged user root."""
    with running.project("unprivileged") as project:
        program = project.root / "id"
        shutil.copy("/usr/bin/id", program)
        program.chmod(0o4755)
        assert shell(project, f"cp --preserve=mode id id2; {program} -u").split() == [str(running.UNPRIVILEGED)]


def interrupt(project: running.Project, number: int, script: str) -> tuple[int, float]:
    """Start a script, send a signal to our process when it says something, return its status and the seconds it took."""
    with subprocess.Popen(
        project.command(["sh", "-c", script]), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(project.output / "stdout")
        begin = time.monotonic()
        process.send_signal(number)
        return process.wait(10), time.monotonic() - begin


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "INT"), (signal.SIGTERM, "TERM"), (signal.SIGHUP, "HUP")])
def test_signal_reaches_command(project: running.Project, number: int, name: str) -> None:
    """A command that is interrupted can clean up, and its last words are kept."""
    script = f"trap 'sleep 0.2; echo cleaned; exit 3' {name}; echo begun; sleep 99 & wait"
    status, _ = interrupt(project, number, script)
    assert status in (128 + number, -number)
    assert (project.output / "stdout").read_text() == "begun\ncleaned\n"
    assert project.executed() is None


def test_stubborn_command_is_killed(project: running.Project) -> None:
    """A command that ignores the signal is killed after the grace."""
    _, seconds = interrupt(project, signal.SIGINT, "trap '' INT; echo begun; sleep 99; sleep 99")
    assert 1.9 < seconds < 5


def test_nothing_survives_our_death(project: running.Project) -> None:
    """When we are killed, the kernel ends bubblewrap and all in the sandbox."""
    marker = f"{project.base}-orphan"
    script = f"(setsid sh -c 'sleep 99; : {marker}' &) ; echo begun; sleep 99"
    with subprocess.Popen(project.command(["sh", "-c", script]), stdout=subprocess.DEVNULL) as process:
        wait_for(project.output / "stdout")
        process.kill()
        process.wait(10)
    end = time.monotonic() + 5
    while running.processes(marker):
        assert time.monotonic() < end
        time.sleep(0.01)
    [holder] = [namespace for namespace, folder in namespaces.holders() if folder.startswith(str(project.base))]
    holder.end()


def test_failure_to_set_up_is_told(project: running.Project) -> None:
    """When bubblewrap fails, its own message is part of the error, and there is no manifest."""
    tools = project.base / "tools"
    tools.mkdir()
    (tools / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2\nexit 1\n")
    (tools / "bwrap").chmod(0o755)
    result = project.run(["true"], environment={"PATH": f"{tools}:{os.environ['PATH']}"})
    assert result.executed is None
    assert b"UsageError: the sandbox can't be set up: bwrap: No permissions" in result.stderr


@needs_root
def test_full_disk_fails_the_run(project: running.Project) -> None:
    """Output that can't be kept is not lost silently: the error names the file, and everything is ended."""
    mount = f"mount -t tmpfs -o size=64k,mode=777 acetate {project.output}"
    before = f"mkdir -m 777 {project.output.parent} {project.output}; {mount}"
    result = project.run(["yes"], before=before)
    assert result.executed is None
    assert f"No space left on device: '{project.output}/stdout'".encode() in result.stderr
