"""Runs of execute for the tests, each in a process of its own, as root or as an unprivileged user.

As a script (`running.py BASE`) it mounts overlays over the roots named in BASE/request.json, calls execute once and
leaves the manifest in BASE/executed.json.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

PROJECT = Path(__file__).resolve().parents[2]
UNPRIVILEGED = 1001


@attrs.frozen
class Result:
    """What a run left: the status and output of the process, and the manifest (None when execute raised)."""

    status: int
    stdout: bytes
    stderr: bytes
    executed: dict[str, Any] | None


@attrs.frozen
class Project:
    """A root with a run folder, owned by the user whom the command runs as."""

    base: Path
    user: str

    @property
    def root(self) -> Path:
        """The folder that is the only root by default."""
        return self.base / "root"

    @property
    def runs(self) -> Path:
        """The folder that holds the run folders."""
        return self.base / "cache" / "ollmchat"

    @property
    def output(self) -> Path:
        """The folder that execute keeps output in."""
        return self.runs / "overlay-1" / "output"

    def command(self, argv: list[str], *, roots: list[str] | None = None, **request: Any) -> list[str]:
        """Write down the request, and return the words that run it."""
        remove(self.runs / "overlay-1")
        (self.base / "executed.json").unlink(missing_ok=True)
        request |= {"argv": argv, "roots": roots or [os.fsdecode(self.root)]}
        (self.base / "request.json").write_text(json.dumps(request))
        words = [sys.executable, str(Path(__file__).resolve()), os.fsdecode(self.base)]
        if self.user == "unprivileged" and os.geteuid() == 0:
            identity = [f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--clear-groups"]
            return ["setpriv", *identity, "--inh-caps=-all", *words]
        return words

    def run(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        before: str | None = None,
        environment: dict[str, str] | None = None,
        **request: Any,
    ) -> Result:
        """Run a command without a terminal.

        before: shell commands to run first, as root in a mount namespace that only this run sees.
        """
        words = self.command(argv, **request)
        if before is not None:
            words = ["unshare", "--mount", "--propagation=private", "sh", "-ec", f'{before}\nexec "$@"', "sh", *words]
        done = subprocess.run(
            words, input=stdin, capture_output=True, env=os.environ | (environment or {}), check=False, timeout=60
        )
        return Result(done.returncode, done.stdout, done.stderr, self.executed())

    def executed(self) -> dict[str, Any] | None:
        """Return the manifest that the last run left."""
        path = self.base / "executed.json"
        return json.loads(path.read_text()) if path.exists() else None

    def own(self, path: Path) -> None:
        """Give a path to the user."""
        if self.user == "unprivileged" and os.geteuid() == 0:
            os.chown(path, UNPRIVILEGED, UNPRIVILEGED)

    def make_root(self, path: Path) -> None:
        """Make a folder and give it to the user."""
        path.mkdir(parents=True)
        self.own(path)


@contextmanager
def project(user: str, parent: str = "/var/tmp") -> Generator[Project, None, None]:
    """Make a project for the user, "root" or "unprivileged", and remove it in the end."""
    base = Path(tempfile.mkdtemp(prefix="acetate-test-", dir=parent))
    base.chmod(0o755)
    made = Project(base, user)
    try:
        (made.base / "root").mkdir()
        made.runs.mkdir(parents=True)
        for path in (base, made.root, made.runs.parent, made.runs):
            made.own(path)
        yield made
    finally:
        remove(base)


def remove(folder: Path) -> None:
    """Remove a folder with all in it, if there is one."""
    if folder.exists():
        # The kernel leaves a folder of mode 000 in each overlay's work folder.
        subprocess.run(["chmod", "-R", "u+rwx", "--", folder], check=True)
        shutil.rmtree(folder)


def processes(marker: str) -> list[int]:
    """Return the pids of all living processes with the marker in their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in words:
                found.append(int(entry.name))
    return found


def main(base: Path) -> None:
    """Mount, execute, leave the manifest."""
    sys.path.insert(0, str(PROJECT))
    sys.path.remove(str(Path(__file__).resolve().parent))
    from schemas import manifest
    from schemas.mount import Holder, Mounted
    from schemas.prepare import Metadata, Prepared, Request, RootFolder
    from stages.execute import execute
    from stages.linux import namespaces

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    request = Request(**json.loads((base / "request.json").read_text()))
    run_folder = base / "cache" / "ollmchat" / "overlay-1"
    twin = Metadata(mode=0o755, uid=0, gid=0, atime_ns=0, mtime_ns=0)
    roots = []
    for number, path in enumerate(request.roots, 1):
        name = f"overlay{number}"
        upper, work, merged = (run_folder / part / name for part in ("upper", "work", "merged"))
        for folder in (upper, work, merged):
            folder.mkdir(parents=True, exist_ok=True)
        roots.append(
            RootFolder(overlay=name, path=path, upper=str(upper), work=str(work), merged=str(merged), twin=twin)
        )
    namespace = namespaces.start(str(run_folder))
    try:
        for root in roots:
            namespaces.mount_overlay(namespace, lower=root.path, upper=root.upper, work=root.work, merged=root.merged)
        prepared = Prepared(
            schema="acetate/prepare/1",
            run="overlay-1",
            request=request,
            run_folder=str(run_folder),
            base_path=str(run_folder / "upper"),
            overlay_map={root.overlay: root.path for root in roots},
            roots=roots,
        )
        mounted = Mounted(
            schema="acetate/mount/1",
            run="overlay-1",
            holder=Holder(**attrs.asdict(namespace)),
            mounts=[],
            xattr_prefix=namespaces.xattr_prefix(namespace),
            baseline_ns={},
        )
        manifest.write(base / "executed.json", execute(prepared, mounted))
    finally:
        namespace.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
