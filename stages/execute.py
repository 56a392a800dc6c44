"""execute: run the command in the sandbox, with the overlays bound over the roots."""

import os
import signal
from pathlib import Path

import attrs

from schemas.execute import Executed
from schemas.mount import Mounted
from schemas.prepare import Prepared
from stages.errors import AcetateError, UsageError
from stages.linux import bubblewrap, namespaces, sandbox, streams


def execute(prepared: Prepared, mounted: Mounted) -> Executed:
    """Run the command of a run and return how it ended, a failure included; its output is kept in the run folder.

    What the command started is dead when this returns or raises.

    Raises UsageError when bubblewrap can't set up the sandbox here, AcetateError when the overlays are not mounted,
    OSError when the output can't be kept (a full disk; the error names the file) or passed on, and KeyboardInterrupt
    or SystemExit once the command was told of the signal behind it.
    """
    namespace = namespaces.Namespace(**attrs.asdict(mounted.holder))
    if not namespace.is_alive():
        raise AcetateError(f"the overlays of run {prepared.run} are mounted no more", "mount them again: doit mount")
    request = prepared.request
    output = Path(prepared.run_folder, "output")
    output.mkdir(mode=0o700, exist_ok=True)
    with streams.Streams(str(output)) as kept:
        try:
            ended = sandbox.run(
                namespace,
                _sandbox(prepared, mounted),
                request.argv,
                streams=kept,
                # Should we be killed before bubblewrap watches over us, this leads to it, as to the mounts' holder.
                environment={**os.environ, namespaces.HOLDER_VARIABLE: prepared.run_folder},
                timeout=request.timeout,
            )
        except sandbox.SandboxError as error:
            raise UsageError(
                f"the sandbox can't be set up: {error}", "see docs/security.md for what it needs of this machine"
            ) from error
    stdout, *stderr = kept.kept
    return Executed(
        schema="acetate/execute/1",
        run=prepared.run,
        argv=request.argv,
        working_folder=request.roots[0],
        exit_status=ended.exit_status,
        signal=_signal_name(ended.exit_status),
        timed_out=ended.timed_out,
        command_started_ns=ended.started_ns,
        command_duration_ns=ended.duration_ns,
        user_cpu_ns=ended.user_cpu_ns,
        system_cpu_ns=ended.system_cpu_ns,
        max_memory=ended.max_memory,
        stdout=stdout,
        stderr=stderr[0] if stderr else None,
    )


def _sandbox(prepared: Prepared, mounted: Mounted) -> bubblewrap.Sandbox:
    return bubblewrap.Sandbox(
        roots=[(root.merged, root.path) for root in prepared.roots],
        hidden=[str(Path(prepared.run_folder).parent)],
        network=prepared.request.network,
        user_namespace=mounted.holder.user_namespace,
        unset=[namespaces.HOLDER_VARIABLE],
    )


def _signal_name(exit_status: int) -> str | None:
    """Return the name of the signal that a status tells of, by the shell's rule 128+n, or None."""
    try:
        return signal.Signals(exit_status - 128).name
    except ValueError:
        return None
