"""How the origins of two files of rows differ, in sentences."""

from ironmoe.bench.benchmarks.reading.origins import (
    CODE,
    GPU,
    MACHINE,
    PROCESSOR,
    SETTING,
    VERSION,
    Facts,
)

NOT_CODE = "The ratios compare machines, not code."


def warnings(a: Facts, b: Facts) -> list[str]:
    """What has to be known before a ratio is read: other machines, machines without a name, other
    settings."""
    found = []
    if other := _differing(a, b, MACHINE):
        found.append(f"OTHER MACHINES: {'; '.join(other)}. {NOT_CODE}")
    elif unnamed := _unnamed(a, b):
        found.append(
            f"{unnamed} not name the processor, so the machines may be others. Then the ratios "
            "compare machines, not code."
        )
    settings = sorted(key for key in a.keys() & b.keys() if key.startswith(SETTING))
    if other := _differing(a, b, settings):
        found.append(f"OTHER SETTINGS: {'; '.join(other)}.")
    return found


def other_differences(a: Facts, b: Facts) -> list[str]:
    """Versions and commits that both files name and that differ: "torch 2.10.0 in A, 2.13.0 in
    B"."""
    versions = sorted(key for key in a.keys() & b.keys() if key.startswith(VERSION))
    return _differing(a, b, [*CODE, *versions])


def _differing(a: Facts, b: Facts, keys: "list[str] | tuple[str, ...]") -> list[str]:
    return [
        f"{key.removeprefix(SETTING).removeprefix(VERSION)} {a[key]} in A, {b[key]} in B"
        for key in keys
        if key in a and key in b and a[key] != b[key]
    ]


def _unnamed(a: Facts, b: Facts) -> str:
    """Which of both files name no machine, with the verb; "" if both do."""
    if GPU in a and GPU in b:
        return ""
    without = [name for name, facts in (("A", a), ("B", b)) if PROCESSOR not in facts]
    return {0: "", 1: f"{''.join(without)} does", 2: "A and B do"}[len(without)]
