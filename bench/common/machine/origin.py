"""Whether two measurements are of one machine and one version, so that they may be compared."""

import hashlib
import json
from typing import Any

from ironmoe.bench.common.machine.provenance import provenance

NO_MATTER = ("memory_gb",)  # a restart of a virtual machine changes it a little


def origin_digest() -> str:
    """A name for this machine and these versions, for a folder of what is measured on it."""
    text = json.dumps(origin(provenance()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def origin(made: dict[str, Any]) -> dict[str, Any]:
    """What ``made`` (see ``provenance``) says of the machine and of the versions. Rows belong into
    one file if it is the same for them.

    The code counts, and not the commit: a commit of a page or of a test changes no number, and an
    installed package has none. Former versions noted the commit alone.
    """
    machine = {key: value for key, value in made.get("machine", {}).items() if key not in NO_MATTER}
    code = made.get("code", made.get("commit"))
    return {"machine": machine, "code": code} | {
        key: made.get(key) for key in ("ironmoe", "versions")
    }
