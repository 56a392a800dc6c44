"""execute.json: how the command ended."""

from typing import Literal

import attrs

from schemas.manifest import Manifest


@attrs.frozen(kw_only=True)
class Executed(Manifest):
    """What execute leaves.

    argv: the command as it was run; working_folder: where.
    exit_status: the command's status as a shell tells it: 128+n when signal n ended it, 124 after a timeout.
    signal: the name of the signal that ended it (a status above 128 is read as one, as shells do), or None.
    timed_out: whether the timeout ended it.
    user_cpu_ns, system_cpu_ns: CPU time of the sandbox and all in it, nanoseconds.
    max_memory: largest resident set of one process in it, bytes.
    stdout, stderr: files in which the output was kept; stderr is None when both went to one terminal or pipe, whose
    output stdout then holds.
    """

    schema: Literal["acetate/execute/1"]
    argv: list[str]
    working_folder: str
    exit_status: int
    signal: str | None
    timed_out: bool
    command_started_ns: int
    command_duration_ns: int
    user_cpu_ns: int
    system_cpu_ns: int
    max_memory: int
    stdout: str
    stderr: str | None
