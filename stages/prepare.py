"""prepare: check the request and make the run folder."""

import os
import shutil
import stat
from itertools import permutations
from pathlib import Path

from schemas.prepare import Metadata, Prepared, Request, RootFolder
from stages import runs
from stages.errors import UsageError
from stages.linux import files, layer

_PROGRAMS = {
    "bwrap": "bubblewrap",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setsid": "util-linux",
    "mount": "mount",
}


def prepare(request: Request) -> Prepared:
    """Check the request, make a run folder with upper, work and merged for each root, and return where all is.

    Raises UsageError before anything is made.
    """
    check(request)
    folder = runs.make_folder()
    roots = [_make_root(folder, number, root) for number, root in enumerate(request.roots, 1)]
    return Prepared(
        schema="acetate/prepare/1",
        run=folder.name,
        request=request,
        run_folder=str(folder),
        base_path=str(folder / "upper"),
        overlay_map={root.overlay: root.path for root in roots},
        roots=roots,
    )


def check(request: Request) -> None:
    """Raise UsageError for a request that no run can be made of."""
    if not request.argv:
        raise UsageError("no command given", "say cmd='SHELL COMMAND', or put argv into the spec file")
    if not request.roots:
        raise UsageError("no root given", "say roots=PATH[:PATH…]")
    for root in request.roots:
        _check_root(root)
    for inner, outer in permutations(request.roots, 2):
        if _contains(outer, inner):
            raise UsageError(
                f"roots must not contain one another: {inner} is in {outer}"
                if inner != outer
                else f"root {inner} is named twice",
                "leave out the inner one: the command may write to all of the outer root",
            )
    for root in request.roots:
        if _contains(root, str(runs.runs_folder())):
            raise UsageError(
                f"root {root} contains the folder of the runs, {runs.runs_folder()}",
                "name a folder below it as the root, or set XDG_CACHE_HOME to a folder outside of it",
            )
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            raise UsageError(f"{program} is not installed", f"install it: apt-get install {package}")


def _check_root(root: str) -> None:
    path = Path(root)
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"root {root}: {error.strerror}", "name an existing folder") from error
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"root {root} is not a folder", "name the folder that it is in")
    if not os.access(root, os.W_OK | os.X_OK | os.R_OK, effective_ids=True):
        raise UsageError(f"root {root} is not writable for you", "name a folder that you may write to")
    for mount_point in _mount_points():
        if mount_point != root and _contains(root, mount_point):
            raise UsageError(
                f"root {root} has another file system mounted in it, at {mount_point}, which no overlay shows",
                "name a folder that holds no mount point, or unmount it",
            )


def _mount_points() -> list[str]:
    """Return all mount points of this mount namespace (proc_pid_mountinfo(5))."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    # Blanks, tabs, newlines and backslashes stand as octal escapes.
    return [os.fsdecode(_unescape_octal(line.split()[4])) for line in lines]


def _unescape_octal(text: bytes) -> bytes:
    for escape, character in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        text = text.replace(escape, character)
    return text


def _contains(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def _make_root(folder: Path, number: int, root: str) -> RootFolder:
    overlay = f"overlay{number}"
    upper, work, merged = (folder / part / overlay for part in ("upper", "work", "merged"))
    for path in (upper, work, merged):
        path.mkdir(mode=0o700, parents=True)
    return RootFolder(
        overlay=overlay,
        path=root,
        upper=str(upper),
        work=str(work),
        merged=str(merged),
        twin=_make_twin(upper, root),
    )


def _make_twin(upper: Path, root: str) -> Metadata:
    """Give upper the metadata of the root, which the merged root shows, and return what it has."""
    descriptor = os.open(root, files.FOLDER_FLAGS)
    try:
        status = os.fstat(descriptor)
        found = files.xattrs(descriptor, ".")
    finally:
        os.close(descriptor)
    # Under these names the overlay would take them for its own; of every other lower folder it hides them too.
    attributes = {name: value for name, value in found.items() if not layer.is_reserved(name)}
    if os.geteuid() == 0:
        os.chown(upper, status.st_uid, status.st_gid)
    elif status.st_gid in os.getgroups():
        os.chown(upper, -1, status.st_gid)
    for name, value in attributes.items():
        os.setxattr(upper, name, value)
    upper.chmod(stat.S_IMODE(status.st_mode))
    os.utime(upper, ns=(status.st_atime_ns, status.st_mtime_ns))
    twin = upper.stat()
    return Metadata(
        mode=stat.S_IMODE(twin.st_mode),
        uid=twin.st_uid,
        gid=twin.st_gid,
        atime_ns=twin.st_atime_ns,
        mtime_ns=twin.st_mtime_ns,
        xattrs=attributes,
    )
