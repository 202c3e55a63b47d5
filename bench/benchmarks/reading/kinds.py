"""The kinds of rows that benchmarks write: how a row is known, what names it, and its figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ironmoe.bench.benchmarks.reading.figures import (
    RATE,
    SHARE,
    SIZE,
    TIME,
    Figure,
    Row,
    counted,
    measured,
    plain,
)


def _itself(row: Row) -> list[Row]:
    return [row]


@dataclass(frozen=True)
class Kind:
    """One kind of rows.

    name: the command that writes them; known_by: entries that each row has and rows of no other
    kind have together, and that are never empty, because an empty cell of a CSV file may also be
    one that its row does not have; keys: entries that name a row: two rows are of the same thing if
    these are equal; who: the key that says whose row it is, for means; series: the key whose values
    are bars side by side; figures: the first one is drawn; has_others: code of others takes turns
    with ours, and ``who`` says whose row it is; computed: nothing is measured, so the machine does
    not matter; split: a row of the file → rows with these keys.
    """

    name: str
    known_by: frozenset[str]
    keys: tuple[str, ...]
    who: str
    series: str
    figures: tuple[Figure, ...]
    has_others: bool = False
    computed: bool = False
    split: Callable[[Row], list[Row]] = _itself

    def figure(self, name: str) -> Figure | None:
        return next((figure for figure in self.figures if figure.name == name), None)

    def part(self, key: Sequence[str], index: int) -> str:
        """One value of a key as people read it: a number stands after its name."""
        try:
            float(key[index])
        except ValueError:
            return key[index]
        return f"{self.keys[index]} {key[index]}"

    def words(self, key: Sequence[str], indices: Iterable[int]) -> str:
        """Several values of a key. An operation may have no variant: what is empty is left out."""
        return ", ".join(filter(None, (self.part(key, i) for i in indices)))


def _by_implementation(row: Row) -> list[Row]:
    """``bench cpu`` has the milliseconds of all in one row."""
    milliseconds, fastest = row["milliseconds"], row.get("fastest")
    if not isinstance(milliseconds, Mapping):
        return []
    return [
        {
            **row,
            "implementation": who,
            "ms": ms,
            "fastest": fastest.get(who) if isinstance(fastest, Mapping) else None,
        }
        for who, ms in milliseconds.items()
    ]


def _by_mode(row: Row) -> list[Row]:
    """``bench offload`` and ``bench scale --throughput`` have the figures of all modes in one
    row."""
    figures = {name: value for name, value in row.items() if isinstance(value, Mapping)}
    milliseconds = figures.get("milliseconds", {})
    return [
        {
            **row,
            **{name: values.get(mode) for name, values in figures.items()},
            "mode": mode,
            "ms": ms,
        }
        for mode, ms in milliseconds.items()
    ]


def _with_images(row: Row) -> list[Row]:
    """Times of attacks on other numbers of images are those of other work."""
    robust = row["robust"]
    return [{**row, "images": robust.get("total") if isinstance(robust, Mapping) else None}]


KINDS = (
    Kind(
        "bench cpu",
        frozenset({"shape", "dtype", "pass", "milliseconds"}),
        ("shape", "dtype", "pass", "implementation"),
        "implementation",
        "implementation",
        (measured("ms", "ms", TIME),),
        has_others=True,
        split=_by_implementation,
    ),
    Kind(
        "bench attacks",
        frozenset({"attack", "model", "library", "seconds", "robust"}),
        ("attack", "model", "images", "library"),
        "library",
        "library",
        (measured("seconds", "s", TIME), counted("robust")),
        has_others=True,
        split=_with_images,
    ),
    Kind(
        "bench images, loading",
        frozenset({"loader", "images", "workers", "images_per_second"}),
        ("images", "workers", "loader"),
        "loader",
        "loader",
        (
            plain("images_per_second", "images/s", RATE),
            plain("peak_mb", "MB", SIZE),
            plain("worker_peak_mb", "MB", SIZE),
        ),
    ),
    Kind(
        "bench images, attack",
        frozenset({"source", "model", "images_per_second", "robust_accuracy"}),
        ("model", "images", "workers", "batch_size", "dtype", "source"),
        "source",
        "source",
        (
            plain("images_per_second", "images/s", RATE),
            plain("peak_mb", "MB", SIZE),
            plain("worker_peak_mb", "MB", SIZE),
            plain("robust_accuracy", "%", SHARE, factor=0.01),
        ),
    ),
    Kind(
        "bench training, inner",
        frozenset({"model", "dtype", "step", "ms"}),
        ("dtype", "step", "model"),
        "step",
        "model",
        (measured("ms", "ms", TIME),),
    ),
    Kind(
        "bench training, methods",
        frozenset({"model", "method", "seed", "clean", "pgd"}),
        ("model", "method", "eps", "seed"),
        "method",
        "seed",
        (
            counted("pgd"),
            counted("apgd-t"),
            counted("clean"),
            plain("train_seconds", "s", TIME),
        ),
    ),
    Kind(
        "training loops",
        frozenset({"loop", "seed", "cpu_seconds"}),
        ("loop", "seed"),
        "loop",
        "seed",
        (
            plain("cpu_seconds", "s", TIME),
            plain("clean", "%", SHARE),
            plain("pgd20", "%", SHARE),
        ),
    ),
    Kind(
        "bench offload",
        frozenset({"model", "images", "milliseconds", "copied_mb"}),
        ("model", "images", "mode"),
        "mode",
        "mode",
        (
            measured("ms", "ms", TIME),
            plain("cpu_ms", "ms", TIME),
            plain("copied_mb", "MB", SIZE),
            plain("saved_mb", "MB", SIZE),
            plain("peak_mb", "MB", SIZE),
            plain("weights_mb", "MB", SIZE),
        ),
        split=_by_mode,
    ),
    Kind(
        "bench scale throughput",
        frozenset({"layer", "pass", "milliseconds", "tokens_per_second"}),
        ("layer", "pass", "mode"),
        "mode",
        "mode",
        (measured("ms", "ms", TIME),),
        split=_by_mode,
    ),
    Kind(
        "bench gpu",
        frozenset({"shape", "pass", "routing", "implementation", "ms"}),
        ("shape", "dtype", "routing", "pass", "implementation"),
        "implementation",
        "implementation",
        (measured("ms", "ms", TIME), plain("peak_bytes", "MB", SIZE, factor=1e-6)),
        has_others=True,
    ),
    Kind(
        "bench kernels",
        frozenset({"operation", "shape", "dtype", "ms"}),
        ("operation", "variant", "shape", "dtype"),
        "operation",
        "dtype",
        (measured("ms", "ms", TIME),),
    ),
    Kind(
        "pytest-benchmark",
        frozenset({"group", "benchmark", "ms"}),
        ("group", "benchmark"),
        "group",
        "group",
        (measured("ms", "ms", TIME),),
    ),
    Kind(
        "bench roofline",
        frozenset({"gpu", "shape", "pass", "kernel", "ms"}),
        ("shape", "pass", "kernel", "gpu"),
        "gpu",
        "gpu",
        (plain("ms", "ms", TIME), plain("gigabytes", "GB", SIZE)),
        computed=True,
    ),
    Kind(
        "bench scale, cost",
        frozenset({"gpu", "shape", "ranks", "pass", "exchange_ms"}),
        ("shape", "pass", "ranks", "gpu"),
        "ranks",
        "ranks",
        (
            plain("layer_ms", "ms", TIME),
            plain("exchange_ms", "ms", TIME),
            plain("experts_ms", "ms", TIME),
            plain("sent_mb", "MB", SIZE),
            plain("off_node_mb", "MB", SIZE),
        ),
        computed=True,
    ),
    Kind(
        "bench scale, pays",
        frozenset({"gpu", "shape", "ranks", "pass", "ep_ms", "fsdp2_ms"}),
        ("shape", "pass", "ranks", "gpu"),
        "ranks",
        "ranks",
        (
            plain("ep_ms", "ms", TIME),
            plain("fsdp2_ms", "ms", TIME),
            plain("replicas_ms", "ms", TIME),
        ),
        computed=True,
    ),
    Kind(
        "bench scale, mesh",
        frozenset({"gpu", "shape", "gpus", "ranks", "between", "pass", "layer_ms"}),
        ("shape", "pass", "gpus", "ranks", "between", "gpu"),
        "ranks",
        "between",
        (plain("layer_ms", "ms", TIME), plain("memory_gb", "GB", SIZE)),
        computed=True,
    ),
    Kind(
        "bench scale, memory",
        frozenset({"gpu", "model", "ranks", "attack_gb", "training_gb"}),
        ("model", "ranks", "gpu"),
        "ranks",
        "ranks",
        (
            plain("attack_gb", "GB", SIZE),
            plain("training_gb", "GB", SIZE),
            plain("kept_gb", "GB", SIZE),
        ),
        computed=True,
    ),
)


def kind_of(row: Row) -> Kind | None:
    """The kind that a row is of; None if it is of none."""
    return next((kind for kind in KINDS if kind.known_by <= row.keys()), None)


def text_of(value: Any) -> str:
    """A value of a key as people read it: a shape as "1576,384,1536,32,2"."""
    if isinstance(value, list | tuple):
        return ",".join(map(text_of, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def telling(keys: Sequence[Sequence[str]]) -> list[int]:
    """The parts of keys that differ among rows; the last one if none does."""
    size = len(keys[0])
    return [i for i in range(size) if len({key[i] for key in keys}) > 1] or [size - 1]
