"""What a manifest read from disk must fulfil beyond the types of its fields: no path leads out of where it belongs."""

from collections.abc import Iterable
from typing import Protocol

from schemas.copy import Copied, Plan
from schemas.manifest import Manifest, ManifestError
from schemas.mount import Mounted
from schemas.prepare import Prepared
from schemas.scan import Scanned


class _Located(Protocol):
    path: str
    overlay_path: str


def check(manifest: Manifest, prepared: Prepared, file: str) -> None:
    """Check a manifest against the one of prepare, which is checked against the folder that it was found in.

    Raises ManifestError that names file and field.
    """
    if isinstance(manifest, Mounted):
        _equal(file, "baseline_ns", sorted(manifest.baseline_ns), sorted(prepared.overlay_map))
    elif isinstance(manifest, Scanned):
        _check_scanned(manifest, prepared, file)
    elif isinstance(manifest, Plan):
        _check_located(file, "steps", manifest.steps, prepared)
        _check_located(file, "folders", manifest.folders, prepared)
        _check_overlay_paths(file, "escaped", manifest.escaped, prepared)
        _check_overlay_paths(file, "links", (link.overlay_path for link in manifest.links), prepared)
        _check_overlay_paths(file, "links", (link.live for link in manifest.links), prepared)
        _check_overlay_paths(file, "staged", manifest.staged, prepared)
    elif isinstance(manifest, Copied):
        _equal(file, "originals", manifest.originals, prepared.base_path)


def check_prepared(prepared: Prepared, folder: str, file: str) -> None:
    """Check that all that prepare made is in the run folder. Raises ManifestError that names file and field."""
    _equal(file, "run_folder", prepared.run_folder, folder)
    _equal(file, "base_path", prepared.base_path, f"{folder}/upper")
    _equal(file, "overlay_map", prepared.overlay_map, {root.overlay: root.path for root in prepared.roots})
    for number, root in enumerate(prepared.roots):
        _equal(file, f"roots[{number}].overlay", root.overlay, f"overlay{number + 1}")
        for part in ("upper", "work", "merged"):
            _equal(file, f"roots[{number}].{part}", getattr(root, part), f"{folder}/{part}/{root.overlay}")
    _equal(file, "request.roots", prepared.request.roots, [root.path for root in prepared.roots])


def _check_scanned(scanned: Scanned, prepared: Prepared, file: str) -> None:
    _equal(file, "base_path", scanned.base_path, prepared.base_path)
    _equal(file, "overlay_map", scanned.overlay_map, prepared.overlay_map)
    for field in ("added", "updated", "removed", "permissions", "untouched", "folders", "relinked"):
        _check_located(file, field, getattr(scanned, field), prepared)
    _check_overlay_paths(file, "layer_xattrs", scanned.layer_xattrs, prepared)
    _check_overlay_paths(file, "hard_links", (link.overlay_path for link in scanned.hard_links), prepared)
    _check_overlay_paths(file, "hard_links", (link.live for link in scanned.hard_links), prepared)
    _check_overlay_paths(file, "index_links", (link.overlay_path for link in scanned.index_links), prepared)
    _check_overlay_paths(file, "redirects", (redirect.overlay_path for redirect in scanned.redirects), prepared)
    indexes = {root.overlay: f"{root.work}/index/" for root in prepared.roots}
    for number, link in enumerate(scanned.index_links):
        index = indexes[link.overlay_path.partition("/")[0]]
        if not link.index_path.startswith(index) or "/" in link.index_path[len(index) :]:
            raise ManifestError(f"{file}: index_links[{number}].index_path: {link.index_path!r} is not in {index}")
    for number, redirect in enumerate(scanned.redirects):
        root = prepared.overlay_map[redirect.overlay_path.partition("/")[0]]
        if not redirect.lower_path.startswith(f"{root}/") or not _is_plain(redirect.lower_path[len(root) + 1 :]):
            raise ManifestError(f"{file}: redirects[{number}].lower_path: {redirect.lower_path!r} is not in {root}")


def _check_located(file: str, field: str, items: Iterable[_Located], prepared: Prepared) -> None:
    roots = prepared.overlay_map
    for number, item in enumerate(items):
        overlay, slash, relative = item.overlay_path.partition("/")
        if overlay not in roots or (slash and not _is_plain(relative)):
            raise ManifestError(f"{file}: {field}[{number}].overlay_path: {item.overlay_path!r} leaves the overlays")
        if item.path != roots[overlay] + slash + relative:
            raise ManifestError(
                f"{file}: {field}[{number}].path: {item.path!r} is not where {item.overlay_path!r} belongs, "
                f"in {roots[overlay]}"
            )


def _check_overlay_paths(file: str, field: str, overlay_paths: Iterable[str], prepared: Prepared) -> None:
    for number, overlay_path in enumerate(overlay_paths):
        overlay, slash, relative = overlay_path.partition("/")
        if overlay not in prepared.overlay_map or (slash and not _is_plain(relative)):
            raise ManifestError(f"{file}: {field}[{number}]: {overlay_path!r} leaves the overlays")


def _is_plain(relative: str) -> bool:
    """Return whether a relative path has no empty name, no "." and no ".." in it, and no NUL."""
    return "\0" not in relative and not any(name in ("", ".", "..") for name in relative.split("/"))


def _equal(file: str, field: str, found: object, expected: object) -> None:
    if found != expected:
        raise ManifestError(f"{file}: {field}: {found!r} where this run has {expected!r}")
