"""Where the rows of a file come from, in every form that files have it: machine, version, settings.

Files of today have "made" (see ``provenance``). Older ones have "versions", "device" and perhaps
"processor" beside their rows, and pytest-benchmark has words of its own.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ironmoe.bench.benchmarks.reading.kinds import text_of

PROCESSOR, GPU = "processor", "GPU"
MACHINE = (PROCESSOR, GPU, "instructions", "cores", "threads", "system")
CODE = ("ironmoe", "commit", "changes", "code")  # files of former versions have "changes"
VERSION, SETTING = "version of ", "setting "
DATE = "date"

Facts = dict[str, str]


def facts_of(block: Mapping[str, Any]) -> Facts:
    """What a dict beside rows says, each in words: keys of MACHINE and CODE, "version of torch",
    "setting images", DATE."""
    return (
        _of_made(block.get("made"))
        | _of_older_files(block)
        | _of_pytest_benchmark(block)
        | _named(SETTING, block.get("settings"))
    )


def joined(blocks: Iterable[Facts]) -> Facts:
    """The facts of a file whose rows were measured on several occasions: all values of each."""
    found: dict[str, dict[str, None]] = {}
    for facts in blocks:
        for key, value in facts.items():
            found.setdefault(key, {})[value] = None
    return {key: " and ".join(values) for key, values in found.items()}


def _of_made(made: Any) -> Facts:
    if isinstance(made, list):
        return joined(_of_made(one) for one in made)
    if not isinstance(made, Mapping):
        return {}
    machine = made.get("machine")
    found = {}
    if isinstance(machine, Mapping):
        found = {key: text_of(machine[key]) for key in MACHINE if machine.get(key) is not None}
        if machine.get("gpus"):
            found[GPU] = text_of(machine["gpus"])
    found |= {key: str(made[key]) for key in (*CODE, DATE) if made.get(key) is not None}
    return found | _versions(made.get("versions"))


def _of_older_files(block: Mapping[str, Any]) -> Facts:
    found = _versions(block.get("versions"))
    device = block.get("device")
    if isinstance(device, Mapping):  # of ``make gpu``
        found[GPU] = str(device.get("name"))
    elif isinstance(device, str) and (threads := re.search(r"(\d+) threads?\b", device)):
        found["threads"] = threads[1]
    for key in (PROCESSOR, "threads", DATE):
        if isinstance(block.get(key), str | int):
            found[key] = str(block[key])
    return found


def _of_pytest_benchmark(block: Mapping[str, Any]) -> Facts:
    machine, commit = block.get("machine_info"), block.get("commit_info")
    found = {}
    if isinstance(machine, Mapping):
        cpu = machine.get("cpu")
        if isinstance(cpu, Mapping) and cpu.get("brand_raw"):
            found[PROCESSOR] = str(cpu["brand_raw"])
            found["cores"] = str(cpu.get("count"))
        found[f"{VERSION}python"] = str(machine.get("python_version"))
    if isinstance(commit, Mapping) and commit.get("id"):
        found["commit"] = str(commit["id"]) + ("-changed" if commit.get("dirty") else "")
    if isinstance(block.get("datetime"), str):
        found[DATE] = block["datetime"]
    return found


def _versions(versions: Any) -> Facts:
    found = _named(VERSION, versions)
    own = found.pop(f"{VERSION}ironmoe", None)
    commit = found.pop(f"{VERSION}commit", None)
    return found | ({"ironmoe": own} if own else {}) | ({"commit": commit} if commit else {})


def _named(prefix: str, values: Any) -> Facts:
    if not isinstance(values, Mapping):
        return {}
    return {f"{prefix}{key}": text_of(value) for key, value in values.items()}


def in_one_line(facts: Facts) -> str:
    """Date, machine and version, as a title or a line of a terminal; "" where nothing is known."""
    if not facts:
        return ""
    threads = facts.get("threads")
    parts = (
        facts.get(DATE, "")[:10],
        facts.get(GPU) or facts.get(PROCESSOR, "a processor without a name"),
        f"{threads} thread{'s' * (threads != '1')}" if threads else "",
        f"ironmoe {facts['ironmoe']}" if "ironmoe" in facts else "",
        f"commit {facts['commit'][:7]}" if "commit" in facts else "",
    )
    return ", ".join(part for part in parts if part)
