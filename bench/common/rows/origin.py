"""Whether two measurements are of one machine and one version, so that they may be compared."""

import hashlib
import json
import subprocess
from functools import cache
from typing import Any

from ironmoe.bench.common.machine.provenance import CHECKOUT, commit, provenance

NO_MATTER = ("memory_gb",)  # a restart of a virtual machine changes it a little


def origin_of_now() -> dict[str, Any]:
    """``provenance()`` with "changes", the digest of ``changes``."""
    return provenance() | {"changes": changes()}


def origin_digest() -> str:
    """A name for this machine and these versions, for a folder of what is measured on it."""
    text = json.dumps(origin(origin_of_now()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def origin(made: dict[str, Any]) -> dict[str, Any]:
    """What ``made`` (see ``provenance``) says of the machine and of the versions. Rows belong into
    one file if it is the same for them."""
    machine = {key: value for key, value in made.get("machine", {}).items() if key not in NO_MATTER}
    keys = ("ironmoe", "commit", "changes", "versions")
    return {"machine": machine} | {key: made.get(key) for key in keys}


@cache
def changes() -> str | None:
    """A digest of how the files of the checkout differ from its commit; None if they do not, or if
    there is no checkout.

    So rows that were measured before an edit are not taken for rows of the code after it.
    """
    if not (commit() or "").endswith("-changed"):
        return None
    try:
        difference = subprocess.run(
            ["git", "-C", str(CHECKOUT), "diff", "HEAD", "--binary"],
            capture_output=True,
            check=True,
            timeout=10,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return hashlib.sha256(difference).hexdigest()[:12]
