"""A run from stage to stage: which stages are done, what each one reads, and the manifests between them."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import attrs

from schemas import manifest
from schemas.cleanup import Cleaned
from schemas.copy import Copied
from schemas.execute import Executed
from schemas.manifest import Manifest
from schemas.mount import Mounted
from schemas.perms import Permitted
from schemas.prepare import Prepared, Request
from schemas.scan import Scanned
from schemas.undo import Undone
from schemas.unmount import Unmounted
from stages import as_owner, runs
from stages.errors import AcetateError, CommandFailedError, ConflictError, UncopiedError, UsageError

STAGES = ("prepare", "mount", "execute", "scan", "copy", "perms", "unmount", "cleanup")

_CLASSES: dict[str, type[Manifest]] = {
    "prepare": Prepared,
    "mount": Mounted,
    "execute": Executed,
    "scan": Scanned,
    "copy": Copied,
    "perms": Permitted,
    "unmount": Unmounted,
    "cleanup": Cleaned,
    "undo": Undone,
}

# What a stage's manifest is made from, and so what makes it stale when it changes. Not mount.json: mounting again over
# the same upper layer, after a reboot say, changes nothing of what a later stage found.
_MADE_FROM: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "mount": ("prepare",),
    "execute": ("prepare",),
    "scan": ("prepare", "execute"),
    "copy": ("prepare", "scan"),
    "perms": ("prepare", "scan", "copy"),
    "unmount": ("prepare",),
    "cleanup": ("prepare",),
    "undo": ("prepare", "scan"),
}

_SYNCED = "synced"  # file in the run folder: the upper layers are on disk

AnyManifest = TypeVar("AnyManifest", bound=Manifest)


class Pipeline:
    """One run, new or one to go on with.

    A run is locked for this object from the first stage that it performs until `close`.
    """

    def __init__(
        self,
        request: Request | None = None,
        *,
        run: str | None = None,
        discard: bool = False,
        choices: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a new run of a request, or go on with a run: the one of the given id, or the newest open one.

        discard: cleanup drops changes that were not copied. choices: fields of the request, by name, that stand in for
        what the run was prepared with.
        """
        self._request = request
        self._run = run
        self._discard = discard
        self._choices = dict(choices or {})
        self._folder: Path | None = None
        self._lock: int | None = None
        self._read: dict[str, tuple[Manifest, str]] = {}
        self._failed = False
        self._wrote = False

    @classmethod
    def of_locked(cls, folder: Path, lock: int, choices: Mapping[str, Any]) -> "Pipeline":
        """Go on with the run in a folder whose lock is held by the given descriptor."""
        pipeline = cls(choices=choices)
        pipeline._folder, pipeline._lock = folder, lock
        return pipeline

    def __enter__(self) -> "Pipeline":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the mounts if a stage failed, and close."""
        self._failed = self._failed or kind is not None
        self.close()

    @property
    def folder(self) -> Path:
        """The run folder. Raises UsageError when there is no run to go on with."""
        if self._folder is None:
            self._open(runs.named(self._run) if self._run else runs.newest_open())
        assert self._folder is not None
        return self._folder

    def _open(self, folder: Path) -> None:
        self._lock = runs.lock(folder)
        self._folder = folder

    def is_done(self, stage: str) -> bool:
        """Return whether a stage is done: its manifest is there and was made from the others as they are now."""
        if self._is_new():
            return False
        if not self._path(stage).exists():
            return False
        done = self.read(stage, _CLASSES[stage])
        if isinstance(done, Copied) and not done.complete:
            return False
        if isinstance(done, Mounted):
            return self._is_mounted(done) or self.is_done("execute")
        if isinstance(done, Undone):
            return False
        if isinstance(done, Unmounted):
            mounted = self.optional("mount", Mounted)
            return mounted is None or not self._is_mounted(mounted)
        return all(self._digest(earlier) == done.made_from.get(earlier) for earlier in _MADE_FROM[stage])

    def _is_new(self) -> bool:
        return self._request is not None and self._folder is None

    def perform(self, stage: str) -> Manifest | None:
        """Perform a stage, write its manifest and return it.

        After an error only what must be done nevertheless is done; cleanup, when it would have to drop changes, is not,
        and returns None.

        Raises what the stage raises; CommandFailedError when the command failed, ConflictError when conflicts stopped
        copy. After any error the mounts are released when this object is closed.
        """
        try:
            return self._perform(stage)
        except BaseException:
            self._failed = True
            raise

    def _perform(self, stage: str) -> Manifest | None:
        try:
            result = self.perform_only(stage)
        except PermissionError:
            if stage not in ("scan", "copy", "perms", "undo") or not as_owner.is_possible():
                raise
            assert self._lock is not None
            as_owner.perform(stage, self.folder, self._lock, self._choices)
            self._read.pop(stage, None)
            result = self.read(stage, _CLASSES[stage])
        if result is not None:
            self._check(result)
        return result

    def perform_only(self, stage: str) -> Manifest | None:
        """Perform a stage, write its manifest and return it, whatever it tells; None if it was left undone."""
        started_ns, began = time.time_ns(), time.perf_counter_ns()
        result: Manifest | None = getattr(self, f"_{stage}")()
        if result is None:
            return None
        duration_ns = time.perf_counter_ns() - began
        made_from = {earlier: self._digest(earlier) for earlier in _MADE_FROM[stage] if self._path(earlier).exists()}
        result = attrs.evolve(result, made_from=made_from, started_ns=started_ns, duration_ns=duration_ns)
        self._read[stage] = result, manifest.write(self._path(stage), result)
        return result

    def _check(self, result: Manifest) -> None:
        """Raise the error that a result stands for."""
        if isinstance(result, Executed) and result.exit_status and self._prepared().request.on_failure == "keep":
            ended = f"was ended by {result.signal}" if result.signal else f"ended with status {result.exit_status}"
            ended = "took longer than its timeout" if result.timed_out else ended
            raise CommandFailedError(
                f"the command {ended}; its changes were not copied", result.run, result.exit_status
            )
        if isinstance(result, Copied | Undone) and not result.complete:
            did = "copied" if isinstance(result, Copied) else result.direction
            raise ConflictError(
                f"nothing was {did}, since somebody else changed what would be overwritten:\n"
                + "\n".join(f"  {conflict.path} {conflict.reason}" for conflict in result.conflicts),
                result.run,
                "conflicts=skip leaves these paths alone; conflicts=overwrite overwrites them, which undo can undo",
            )

    def read(self, stage: str, kind: type[AnyManifest]) -> AnyManifest:
        """Return the manifest of a stage of this run.

        Raises UsageError when it is missing, or can't be used (ManifestError says why).
        """
        if stage not in self._read:
            if not self._path(stage).exists():
                raise UsageError(f"run {self.folder.name}: {stage} was not done yet", f"do it first: doit {stage}")
            try:
                self._read[stage] = self._read_checked(stage, kind)
            except manifest.ManifestError as error:
                raise UsageError(
                    str(error), f"nothing was touched; remove the file to have {stage} done again"
                ) from error
        found, _ = self._read[stage]
        assert isinstance(found, kind)
        return found

    def _read_checked(self, stage: str, kind: type[Manifest]) -> tuple[Manifest, str]:
        from schemas import checks

        file = str(self._path(stage))
        found, digest = manifest.read(self._path(stage), kind, self.folder.name)
        if isinstance(found, Prepared):
            checks.check_prepared(found, str(self.folder), file)
        else:
            checks.check(found, self.read("prepare", Prepared), file)
        return found, digest

    def optional(self, stage: str, kind: type[AnyManifest]) -> AnyManifest | None:
        """Return the manifest of a stage of this run, None when it was not done. Raises UsageError."""
        return self.read(stage, kind) if self._path(stage).exists() else None

    def _path(self, stage: str) -> Path:
        if self._folder is None and self._run is None and stage == "undo":
            self._open(runs.newest_copied())
        return self.folder / "manifests" / f"{stage}.json"

    def _digest(self, stage: str) -> str:
        if not self._path(stage).exists():
            return ""
        self.read(stage, _CLASSES[stage])
        return self._read[stage][1]

    def _prepare(self) -> Prepared:
        if self._request is None:
            raise UsageError(f"run {self.folder.name} was prepared already", "begin a new one with cmd='SHELL COMMAND'")
        from stages.prepare import prepare

        prepared = prepare(self._request)
        self._open(Path(prepared.run_folder))
        return prepared

    def _prepared(self) -> Prepared:
        """Return what prepare left, with the choices made since."""
        prepared = self.read("prepare", Prepared)
        if not self._choices:
            return prepared
        return attrs.evolve(prepared, request=attrs.evolve(prepared.request, **self._choices))

    def _mount(self) -> Mounted:
        from stages import gc
        from stages.mount import mount

        prepared = self.read("prepare", Prepared)
        if self._path("mount").exists():
            self._check_layer()
        try:
            return mount(prepared, self.optional("mount", Mounted))
        except UsageError:
            if not self._path("execute").exists():
                gc.remove_folder(self.folder)
            raise

    def _mounted(self) -> Mounted:
        """Return how the overlays are mounted; mount them again if what held them is gone."""
        mounted = self.read("mount", Mounted)
        if not self._is_mounted(mounted):
            self.perform("mount")
        return self.read("mount", Mounted)

    def _is_mounted(self, mounted: Mounted) -> bool:
        from stages.linux.namespaces import Namespace

        return Namespace(**attrs.asdict(mounted.holder)).is_alive()

    def _check_layer(self) -> None:
        """Raise AcetateError when a restart of the machine may have lost what the command wrote.

        The overlay does not wait for the disk (option volatile), so it is not known what was written by then.
        """
        from stages.linux import namespaces

        mounted = self.read("mount", Mounted)
        lost = mounted.holder.boot_id != namespaces.boot_id() and not (self.folder / _SYNCED).exists()
        if lost and self._path("execute").exists() and not self._path("copy.plan").exists():
            raise AcetateError(
                f"the machine was restarted since run {self.folder.name} wrote its changes, and some may be lost",
                "drop the run, and begin a new one",
            )

    def _sync_layer(self) -> None:
        """See to it that a restart of the machine loses nothing of a run that is left open."""
        from stages import commit

        prepared = self.read("prepare", Prepared)
        commit.sync([prepared.base_path])
        (self.folder / _SYNCED).touch()

    def _execute(self) -> Executed:
        from stages.execute import execute

        mounted = self._mounted()
        (self.folder / _SYNCED).unlink(missing_ok=True)
        self._wrote = True
        return execute(self._prepared(), mounted)

    def _scan(self) -> Scanned:
        from stages.scan import scan

        self.read("execute", Executed)
        if self._path("copy").exists() and self.read("copy", Copied).complete:
            raise UsageError(f"the changes of run {self.folder.name} were copied already", "begin a new run")
        self._check_layer()
        return scan(self.read("prepare", Prepared), self.read("mount", Mounted))

    def _copy(self) -> Copied:
        from stages.copy import copy

        self._check_layer()
        prepared = self._prepared()
        return copy(prepared, self.read("mount", Mounted), self.read("scan", Scanned))

    def _perms(self) -> Permitted:
        from stages.perms import perms

        return perms(self._prepared(), self.read("scan", Scanned), self.read("copy", Copied))

    def _unmount(self) -> Unmounted:
        from stages.unmount import unmount

        return unmount(self.read("prepare", Prepared), self.optional("mount", Mounted))

    def _cleanup(self) -> Cleaned | None:
        from stages.cleanup import cleanup

        scanned = self.optional("scan", Scanned) if self.is_done("scan") else None
        copied = self.optional("copy", Copied)
        try:
            return cleanup(self.read("prepare", Prepared), scanned, copied, discard=self._discard)
        except UncopiedError:
            if self._failed:
                return None
            raise

    def _undo(self) -> Undone:
        from stages.undo import undo

        if not self._path("copy.plan").exists():
            raise UsageError(f"the changes of run {self.folder.name} were not copied", "there is nothing to undo")
        return undo(
            self._prepared(),
            self.read("scan", Scanned),
            self.optional("copy", Copied),
            self.optional("perms", Permitted),
            self.optional("undo", Undone),
        )

    def close(self) -> None:
        """Release the mounts if a stage failed; let others use the run."""
        if self._folder is None:
            return
        try:
            if self._failed and self._folder.exists() and self._path("prepare").exists():
                self.perform_only("unmount")
            if self._wrote and runs.is_open(self._folder) and self._prepared().request.sync:
                self._sync_layer()
        finally:
            self._folder = None
            if self._lock is not None:
                runs.unlock(self._lock)
                self._lock = None
