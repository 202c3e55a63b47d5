"""The layers that ``--shapes`` names, or describes by five numbers."""

from collections.abc import Sequence

from ironmoe.bench.benchmarks.shapes import SIZES, Shape
from ironmoe.bench.common.choices import did_you_mean, named
from ironmoe.bench.common.machine.hardware import memory_gb
from ironmoe.bench.common.user_error import UserError


def select_shapes(
    chosen: str | Sequence[str] | None,
    known: Sequence[Shape],
    default: Sequence[Shape] | None = None,
) -> tuple[Shape, ...]:
    """The shapes that the values of ``--shapes`` ask for, each once.

    Args:
        chosen: texts, which semicolons may divide further: "olmoe,mixtral" or "788,192,768,8,2".
            Names may have any case. None, or no text, is ``default``.
        known: what a name may be of.
        default: all of ``known`` if None.

    Raises:
        UserError: a name is not known, or five numbers are no layer.
    """
    texts = [chosen] if isinstance(chosen, str) else list(chosen or ())
    if not texts:
        return tuple(known if default is None else default)
    parts = [part for text in texts for part in text.split(";")]
    return tuple(dict.fromkeys(shape for part in parts for shape in _of_part(part, known)))


def shape_of(name: str, known: Sequence[Shape]) -> Shape | None:
    """The shape of this name, which may be five numbers; None for the empty name."""
    return select_shapes(name, known)[0] if name else None


def check_memory(shape: Shape, bytes_a_number: int) -> None:
    """``bytes_a_number``: of all copies of the weights and of the rows that there are at a time.

    Raises:
        UserError: the layer does not fit into the memory of this machine.
    """
    weights = shape.num_experts * shape.dim * (shape.wide + shape.hidden)
    rows = shape.rows * (shape.dim + shape.wide + shape.hidden)
    needed, there = (weights + rows) * bytes_a_number / 1e9, memory_gb()
    if there is not None and needed > there:
        raise UserError(
            f"--shapes: {shape.name} needs about {needed:.0f} GB, this machine has {there:.0f} GB"
        )


def _of_part(part: str, known: Sequence[Shape]) -> list[Shape]:
    entries = [entry.strip() for entry in part.split(",")]
    if any(entry[:1] in "-+." or entry[:1].isdecimal() for entry in entries if entry):
        return [_of_numbers(part.strip(), entries)]

    by_name = {shape.name: shape for shape in known}
    names = [named(entry, by_name) for entry in entries]
    if unknown := [name for name in names if name not in by_name]:
        raise UserError(
            f"--shapes: {', '.join(map(repr, unknown))} not among {', '.join(by_name)}"
            f"{did_you_mean(unknown[0], by_name)}; five numbers {SIZES} describe another layer"
        )
    return [by_name[name] for name in names]


def _of_numbers(part: str, entries: list[str]) -> Shape:
    try:
        sizes = [int(entry) for entry in entries]
    except ValueError:
        sizes = []
    if len(sizes) != len(SIZES.split(",")) or min(sizes) < 1:
        raise UserError(
            f"--shapes must be names, or five whole numbers {SIZES} of at least 1, got {part!r}; "
            "repeat the option for more layers"
        )
    tokens, dim, hidden, num_experts, top_k = sizes
    if top_k > num_experts:
        raise UserError(
            f"--shapes: K must be at most E, got K = {top_k} and E = {num_experts} in {part!r}"
        )
    shape = Shape("", tokens, dim, hidden, num_experts, top_k)
    return shape._replace(name=shape.numbers)
