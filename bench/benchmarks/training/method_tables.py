"""The tables of the part ``methods``: every method over the seeds that are finished, for the
terminal and in Markdown for docs/training.md."""

from collections.abc import Iterable, Sequence
from math import isnan
from typing import Any, NamedTuple

from rich.table import Table

from ironmoe.bench.benchmarks.training.evaluation import MEASURES
from ironmoe.bench.benchmarks.training.models import DENSE, MODELS
from ironmoe.bench.benchmarks.training.runs import VARIANTS
from ironmoe.bench.common.statistics import Difference, Spread, paired_difference, spread
from ironmoe.bench.reports.tables import Column, cells, headers, markdown_table, terminal_table

BASE = "pgd-at"  # what the other methods are compared with
Row = dict[str, Any]


class MethodResult(NamedTuple):
    """One method on one model, over seeds.

    runs: how many; accuracy, difference: by measure, in percent and in points; the difference to
    BASE at the same eps is over the seeds that both have, and None for BASE itself; seconds: of the
    fastest training, which other load on the machine held up least; stopped: how many runs a guard
    has ended.
    """

    model: str
    method: str
    runs: int
    accuracy: dict[str, Spread]
    difference: dict[str, Difference | None]
    seconds: float
    stopped: int


def method_results(rows: Iterable[Row]) -> list[MethodResult]:
    """The rows of finished runs, put together by model and method, in the order in which they
    come."""
    groups = _groups(rows)
    return [
        MethodResult(
            model,
            method,
            len(by_seed),
            {measure: spread(_percents(by_seed, measure, by_seed)) for measure in MEASURES},
            {
                measure: _difference(by_seed, groups.get((model, _base_of(method)), {}), measure)
                if method != _base_of(method)
                else None
                for measure in MEASURES
            },
            min(row["train_seconds"] for row in by_seed.values()),
            sum(row["stopped"] for row in by_seed.values()),
        )
        for (model, method), by_seed in groups.items()
    ]


class ModelDifference(NamedTuple):
    """The V-MoE minus the dense model of the same seed, trained by the same method, in points by
    measure."""

    method: str
    difference: dict[str, Difference | None]


def model_differences(rows: Iterable[Row]) -> list[ModelDifference]:
    """What experts change, for each method that both models were trained by."""
    groups = _groups(rows)
    return [
        ModelDifference(
            method,
            {m: _difference(runs, groups[DENSE[model], method], m) for m in MEASURES},
        )
        for (model, method), runs in groups.items()
        if (DENSE.get(model), method) in groups
    ]


def _base_of(method: str) -> str:
    """BASE, or the variant of it that is trained and attacked at the same eps."""
    wanted = VARIANTS[BASE]._replace(eps_share=VARIANTS[method].eps_share)
    return next(name for name, variant in VARIANTS.items() if variant == wanted)


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, Row]]:
    """(model, method) → seed → row."""
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["method"]), {})[row["seed"]] = row
    return groups


def _difference(runs: dict[int, Row], base: dict[int, Row], measure: str) -> Difference | None:
    seeds = sorted(runs.keys() & base.keys())
    if not seeds:
        return None
    return paired_difference(_percents(runs, measure, seeds), _percents(base, measure, seeds))


def _percents(runs: dict[int, Row], measure: str, seeds: Iterable[int]) -> list[float]:
    return [100 * runs[seed][measure]["value"] for seed in seeds]


def _accuracy(measure: str) -> Column[MethodResult]:
    return Column(MEASURES[measure], lambda result: _spread_text(result.accuracy[measure]))


def _gain(measure: str) -> Column[MethodResult]:
    return Column(
        f"{MEASURES[measure]} − {BASE}", lambda result: _gain_text(result.difference[measure])
    )


def _gap(measure: str) -> Column[ModelDifference]:
    return Column(MEASURES[measure], lambda item: _gain_text(item.difference[measure]))


COLUMNS: Sequence[Column[MethodResult]] = (
    Column("model", lambda result: MODELS[result.model]),
    Column("method", lambda result: result.method),
    Column("runs", lambda result: str(result.runs)),
    *(_accuracy(measure) for measure in MEASURES),
    *(_gain(measure) for measure in MEASURES),
    Column("seconds", lambda result: f"{result.seconds:.0f}"),
    Column("stopped", lambda result: str(result.stopped or "–")),
)
IN_TERMINAL = [column for column in COLUMNS if BASE not in column.header]


DIFFERENCE_COLUMNS: Sequence[Column[ModelDifference]] = (
    Column("V-MoE − ViT", lambda item: item.method),
    *(_gap(measure) for measure in MEASURES),
)


def run_line(row: Row) -> str:
    """What one finished run found."""
    accuracies = "  ".join(
        f"{title} {100 * row[measure]['value']:.1f} %" for measure, title in MEASURES.items()
    )
    seconds = f"{row['train_seconds']:.0f} s of training"
    warnings = "".join(f"\n  {warning}" for warning in row["warnings"])
    return f"{row['model']}, {row['method']}, seed {row['seed']}: {accuracies}, {seconds}{warnings}"


def methods_table(results: Sequence[MethodResult]) -> Table:
    """For the terminal, which has no room for differences."""
    table = terminal_table(headers(IN_TERMINAL), names=2)
    for result in results:
        table.add_row(*cells(IN_TERMINAL, result))
    return table


def methods_markdown(
    results: Sequence[MethodResult], differences: Sequence[ModelDifference] = ()
) -> str:
    """For docs/training.md: the methods, and below what experts change."""
    tables = [markdown_table(COLUMNS, results)]
    if differences:
        tables.append(markdown_table(DIFFERENCE_COLUMNS, differences))
    return "\n".join(tables)


def _spread_text(values: Spread) -> str:
    return f"{values.mean:.1f}" if isnan(values.sd) else f"{values.mean:.1f} ± {values.sd:.1f}"


def _gain_text(difference: Difference | None) -> str:
    """The difference in points; in brackets its 95 % t interval."""
    if difference is None:
        return "–"
    if isnan(difference.low):
        return f"{difference.mean:+.1f}"
    return f"{difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
