"""cleanup.json: what was removed from the run folder."""

from typing import Literal

import attrs

from schemas.manifest import Manifest


@attrs.frozen(kw_only=True)
class Cleaned(Manifest):
    """What cleanup leaves.

    removed: names in the run folder. discarded: whether changes that were not copied were dropped.
    originals: the folder that keeps the originals for undo, None if there are none.
    """

    schema: Literal["acetate/cleanup/1"]
    removed: list[str]
    discarded: bool
    originals: str | None
