"""Whether two measurements are of one machine and one version, so that they may be compared."""

import hashlib
import json
from typing import Any

from ironmoe.bench.common.machine.provenance import CHANGED, code_digest, commit, provenance

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


def changes() -> str | None:
    """A digest of the code where no commit says which it is: in a checkout whose files differ from
    their commit, and where there is no git, as in an installed package. Else None.

    So rows that were measured before an edit are not taken for rows of the code after it, nor those
    of one package for those of another of the same version.
    """
    named = commit()
    return code_digest() if named is None or named.endswith(CHANGED) else None
