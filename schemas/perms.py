"""perms.json: which permissions and times were carried over."""

from typing import Literal

import attrs

from schemas.manifest import Manifest
from schemas.prepare import Metadata


@attrs.define(kw_only=True)
class MetadataSet:
    """Metadata that was set on one live path."""

    path: str
    before: Metadata
    after: Metadata


@attrs.define(kw_only=True)
class Refused:
    """What could not be carried over on one live path, and why."""

    path: str
    what: str
    reason: str


@attrs.frozen(kw_only=True)
class Permitted(Manifest):
    """What perms leaves.

    ended_ns: by overlay name, the newest ctime that a file not changed since then can have (see mount.json).
    """

    schema: Literal["acetate/perms/1"]
    done: list[MetadataSet]
    refused: list[Refused]
    ended_ns: dict[str, int]
