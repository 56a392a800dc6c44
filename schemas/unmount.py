"""unmount.json: what was released."""

from typing import Literal

import attrs

from schemas.manifest import Manifest
from schemas.mount import Holder


@attrs.frozen(kw_only=True)
class Unmounted(Manifest):
    """What unmount leaves.

    released: the merged folders that are mounted no more. holder: what had held them, None if nothing was mounted.
    """

    schema: Literal["acetate/unmount/1"]
    released: list[str]
    holder: Holder | None
