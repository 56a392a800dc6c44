"""undo.json: how a copy was taken back, or made again."""

from typing import Literal

import attrs

from schemas.copy import Conflict, Done
from schemas.manifest import Manifest

UNDO_PLAN_FILE = "undo.plan.json"


@attrs.frozen(kw_only=True)
class Undone(Manifest):
    """What undo leaves.

    direction: "undone" when the live tree is as before the copy, "redone" when an undo was taken back.
    complete: False when conflicts stopped it, and nothing was changed.
    plan: SHA-256 digest of the plan that was carried out, undo.plan.json; "" if none was.
    ended_ns: by overlay name, the newest ctime that a file not changed since then can have (see mount.json).
    """

    schema: Literal["acetate/undo/1"]
    direction: Literal["undone", "redone"]
    complete: bool
    plan: str
    done: list[Done]
    conflicts: list[Conflict]
    ended_ns: dict[str, int]
