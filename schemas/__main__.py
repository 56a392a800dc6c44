"""Write the JSON Schemas of the manifests: `python -m schemas`; with --check, tell whether they are current."""

import json
import sys
from pathlib import Path

import msgspec

from schemas.cleanup import Cleaned
from schemas.copy import Copied, Plan
from schemas.execute import Executed
from schemas.manifest import Manifest
from schemas.mount import Mounted
from schemas.perms import Permitted
from schemas.prepare import Prepared
from schemas.scan import Scanned
from schemas.undo import Undone
from schemas.unmount import Unmounted

MANIFESTS: dict[str, type[Manifest]] = {
    "prepare": Prepared,
    "mount": Mounted,
    "execute": Executed,
    "scan": Scanned,
    "copy": Copied,
    "copy.plan": Plan,
    "perms": Permitted,
    "unmount": Unmounted,
    "cleanup": Cleaned,
    "undo": Undone,
}


def schema_file(stage: str) -> Path:
    """Return the file that holds the JSON Schema of a stage's manifest."""
    return Path(__file__).parent / f"{stage}.schema.json"


def schema_text(stage: str) -> str:
    """Return the JSON Schema of a stage's manifest, as it is to be in its file."""
    schema = msgspec.json.schema(MANIFESTS[stage])
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def main() -> int:
    """Write the schemas, or check them; return the exit status."""
    if sys.argv[1:] == ["--check"]:
        stale = [
            stage
            for stage in MANIFESTS
            if not schema_file(stage).exists() or schema_file(stage).read_text() != schema_text(stage)
        ]
        for stage in stale:
            print(f"{schema_file(stage)} is not current: run python -m schemas")
        return 1 if stale else 0
    for stage in MANIFESTS:
        schema_file(stage).write_text(schema_text(stage))
    return 0


if __name__ == "__main__":
    sys.exit(main())
