"""Which blocks are tried in place of the present ones."""

from ironmoe.kernels.tuning import Blocks


def neighbours(blocks: Blocks, product: str) -> list[Blocks]:
    """All blocks that differ from these by one step in one field, or in two that belong together:
    columns with parts of the epilogue or warps, terms of a step with stages.

    ``m`` changes only for the weight gradient, because the tiles of the other products are cut
    before.
    """
    of_weights = product == "weight_gradient"
    steps: dict[str, tuple[float, ...]] = {
        "n": (0.5, 2),
        "k": (0.5, 2),
        "warps": (0.5, 2),
        "stages": (-1, 1),
        **(
            {"m": (0.5, 2)}
            if of_weights
            else {"group": (0.5, 2), "split": (0.5, 2), "persistent": (1,)}
        ),
        **({"box": (1,)} if product == "gated" else {}),
        **({"preload": (1,)} if product.startswith("hidden_gradient") else {}),
    }
    single = [{field: step} for field, found in steps.items() for step in found]

    # A block with twice the columns needs twice the warps, to keep the registers of a thread; one
    # with longer steps has shared memory for fewer stages.
    together: list[dict[str, float]] = [
        {"k": 0.5, "stages": 1},
        {"k": 0.5, "stages": 2},
        {"k": 2, "stages": -1},
        {"n": 0.5, "warps": 0.5},
        {"n": 2, "warps": 2},
    ]

    if of_weights:
        together += [
            {"m": a, other: b} for other in ("warps", "n") for a in (0.5, 2) for b in (0.5, 2)
        ]
    else:
        together += [{"n": 0.5, "split": 0.5}, {"n": 2, "split": 2}]

    stepped = [_stepped(blocks, change) for change in single + together]
    return list(
        dict.fromkeys(
            candidate for candidate in stepped if _may_be(candidate) and candidate != blocks
        )
    )


def _stepped(blocks: Blocks, change: dict[str, float]) -> Blocks:
    fields = blocks._asdict()
    for field, step in change.items():
        if field in ("persistent", "box", "preload"):
            fields[field] = not fields[field]
        else:
            fields[field] = fields[field] + step if field == "stages" else int(fields[field] * step)
    return Blocks(**fields)


def _may_be(b: Blocks) -> bool:
    ranges = {
        "m": (16, 256),
        "n": (32, 256),
        "k": (32, 128),
        "warps": (4, 8),
        "stages": (2, 7),
        "group": (1, 32),
        "split": (1, 8),
    }
    return all(low <= getattr(b, field) <= high for field, (low, high) in ranges.items())
