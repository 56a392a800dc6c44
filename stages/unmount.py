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
    for namespace in _holding(prepared, mounted):
        namespace.end()
        if namespace.is_alive():
            raise AcetateError(f"the mounts of run {prepared.run} are still held by process {namespace.pid}")
    return Unmounted(
        schema="acetate/unmount/1",
        run=prepared.run,
        released=[mount.merged for mount in mounted.mounts] if mounted else [],
        holder=mounted.holder if mounted else None,
    )


def _holding(prepared: Prepared, mounted: Mounted | None) -> list[namespaces.Namespace]:
    if mounted:
        namespace = namespaces.Namespace(**attrs.asdict(mounted.holder))
        if namespace.is_alive():
            return [namespace]
    # A mount stage that was killed leaves a holder that no manifest names.
    return [namespace for namespace, run_folder in namespaces.holders() if run_folder == prepared.run_folder]
