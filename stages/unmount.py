"""unmount: release the mounts of a run."""

import attrs

from schemas.mount import Mounted
from schemas.prepare import Prepared
from schemas.unmount import Unmounted
from stages.errors import AcetateError
from stages.linux import namespaces


def unmount(prepared: Prepared, mounted: Mounted | None) -> Unmounted:
    """End what holds the run's mounts, and so the mounts; all is well when nothing is mounted.

    Raises AcetateError when a holder of the run is still there afterwards.
    """
    release(prepared.run_folder, mounted)
    return Unmounted(
        schema="acetate/unmount/1",
        run=prepared.run,
        released=[mount.merged for mount in mounted.mounts] if mounted else [],
        holder=mounted.holder if mounted else None,
    )


def release(run_folder: str, mounted: Mounted | None) -> list[int]:
    """End all that holds mounts of the run in the folder; return the pids of what was ended.

    Raises AcetateError when one of them is still there afterwards.
    """
    ended = []
    for namespace in _holding(run_folder, mounted):
        namespace.end()
        if namespace.is_alive():
            raise AcetateError(f"the mounts in {run_folder} are still held by process {namespace.pid}")
        ended.append(namespace.pid)
    return ended


def _holding(run_folder: str, mounted: Mounted | None) -> list[namespaces.Namespace]:
    if mounted:
        namespace = namespaces.Namespace(**attrs.asdict(mounted.holder))
        if namespace.is_alive():
            return [namespace]
    # A stage that was killed leaves holders that no manifest names.
    return [namespace for namespace, held in namespaces.holders() if held == run_folder]
