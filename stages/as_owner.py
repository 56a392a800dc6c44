"""One stage of an unprivileged user's run in a user namespace where modes do not keep an owner out.

A command may leave files and folders that their own owner can't read, enter or change (mode 000, say). In a user
namespace of its own a process may do so nevertheless with what belongs to the user (capabilities(7):
CAP_DAC_OVERRIDE, for files whose owner and group the namespace maps), without a change of any mode.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from stages.errors import AcetateError

_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from stages import as_owner; as_owner.main(*sys.argv[2:])"
_MARK = "ACETATE_AS_OWNER"


def is_possible() -> bool:
    """Return whether a stage that was refused permission may be tried in this way."""
    return os.geteuid() != 0 and _MARK not in os.environ


def perform(stage: str, folder: Path, lock: int, choices: Mapping[str, object]) -> None:
    """Perform a stage of the run in the folder; its manifest tells the result.

    lock: descriptor that holds the run's lock, which the process shares.

    Raises AcetateError with what the process said.
    """
    user = [f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}"]
    python = [sys.executable, "-I", "-c", _PROGRAM, str(Path(__file__).parent.parent)]
    result = subprocess.run(
        ["unshare", "--user", *user, "--keep-caps", "--", *python, stage, str(folder), str(lock), json.dumps(choices)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[lock],
        env={**os.environ, _MARK: "yes"},
        check=False,
    )
    if result.returncode:
        raise AcetateError(result.stderr.decode(errors="replace").strip())


def main(stage: str, folder: str, lock: str, choices: str) -> None:
    """Perform the stage in this process, which is in the user namespace."""
    from stages.pipeline import Pipeline

    pipeline = Pipeline.of_locked(Path(folder), int(lock), json.loads(choices))
    try:
        pipeline.perform_only(stage)
    except (AcetateError, OSError) as error:
        sys.exit(str(error))
