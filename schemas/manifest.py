"""What every manifest has, and how one is written and read.

The attrs classes in this package are the only description of the manifests: msgspec encodes, decodes and checks
by them, and their JSON Schemas are generated from them (`python -m schemas`).
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs
import msgspec

from schemas import names


class ManifestError(Exception):
    """A manifest that can't be used; the message names the file and, where it can, the field."""


@attrs.frozen(kw_only=True)
class Manifest:
    """What stands at the head of every manifest.

    run: the run's id, the name of its run folder.
    made_from: SHA-256 digests, in hexadecimal, of the manifests that this one was made from, by stage.
    started_ns: when the stage began, nanoseconds since the epoch.
    duration_ns: how long it took, in nanoseconds.
    """

    run: str
    made_from: dict[str, str] = attrs.field(factory=dict)
    started_ns: int = 0
    duration_ns: int = 0


AnyManifest = TypeVar("AnyManifest", bound=Manifest)


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as JSON in UTF-8, one line a top-level field and list item so that people can read it."""
    try:
        if not names.UTF8_FILE_SYSTEM:
            manifest = _map_strings(manifest, names.to_text)
        return _encode(manifest)
    except UnicodeEncodeError:
        return _encode(_map_strings(manifest, names.to_text))


def _encode(manifest: Manifest) -> bytes:
    fields = ((field.name, getattr(manifest, field.name)) for field in attrs.fields(type(manifest)))
    return (
        b"{\n" + b",\n".join(_ENCODER.encode(name) + b": " + _encode_value(value) for name, value in fields) + b"\n}\n"
    )


def _encode_value(value: Any) -> bytes:
    if isinstance(value, list) and value and attrs.has(type(value[0])):
        return b"[\n" + b",\n".join(map(_ENCODER.encode, value)) + b"\n]"
    return _ENCODER.encode(value)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of the value with every string in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if attrs.has(type(value)):
        fields = attrs.fields(type(value))
        return type(value)(**{field.name: _map_strings(getattr(value, field.name), change) for field in fields})
    return value


_ENCODER = msgspec.json.Encoder()


def digest(content: bytes) -> str:
    """Return the SHA-256 digest, in hexadecimal, that `made_from` records."""
    return hashlib.sha256(content).hexdigest()


def write(path: Path, manifest: Manifest) -> str:
    """Write the manifest so that a crash leaves the old file or the new one, and return its digest.

    Raises OSError.
    """
    content = encode(manifest)
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return digest(content)


def read(path: Path, kind: type[AnyManifest], run: str) -> tuple[AnyManifest, str]:
    """Read a manifest of the given class and run; return it and its digest.

    Raises ManifestError when it is missing, truncated, of another version or run, or has a field of a wrong type.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from error
    manifest = decode(content, kind, str(path))
    if manifest.run != run:
        raise ManifestError(f"{path}: run: belongs to run {manifest.run!r}, not to {run!r}")
    return manifest, digest(content)


def decode(content: bytes, kind: type[AnyManifest], origin: str) -> AnyManifest:
    """Return the manifest that the JSON holds; `origin` names the file in errors.

    Raises ManifestError.
    """
    try:
        manifest = msgspec.json.decode(content, type=kind)
        if b"\\u0000" in content or not names.UTF8_FILE_SYSTEM:
            manifest = _map_strings(manifest, names.from_text)
        return manifest
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ManifestError(f"{origin}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    text = str(error)
    if "`$.schema`" in text:
        return f"schema: another kind or version of manifest than this program reads ({text})"
    return text
