"""A study that nobody trained, with every number that a study can have."""

import zlib
from html.parser import HTMLParser
from math import log2, nan

import numpy as np
import pytest

from ironmoe.bench.common.radii import exact
from ironmoe.bench.study.ladder.arms import LADDER
from ironmoe.bench.study.ladder.training import TrainingSettings
from ironmoe.bench.study.measure.budget import Budget, robust_budget
from ironmoe.bench.study.measure.table import all_measurements
from ironmoe.bench.study.report.facts import ArmFacts, StudyFacts
from ironmoe.bench.study.statistics.measured import Measured

LAYERS = ("blocks.1.mlp", "blocks.2.mlp")
POLICIES = (
    *("drop best", "random", "lowest", "permuted", "random of best"),
    *("drop best, same sum", "random, same sum", "uniform, same sum", "renormalized"),
)
LOCAL = 25  # images whose surroundings are looked at


def made_up_facts(arms, trainings, **changes):
    budget = Budget(
        clean_images=200, images=40, routed_images=30, local_images=LOCAL, swap_images=LOCAL
    )
    budgets = {
        name: robust_budget(budget, 25.5) if name == "pgd-at" else budget for name in trainings
    }
    measurements = all_measurements()
    facts = StudyFacts(
        data="made-up",
        checksum="c0ffee",
        classes=10,
        test_images=1000,
        arms=tuple(
            ArmFacts(arm, 7_000_000 + 1000 * place, 200_000 + 50_000 * arm.experts)
            for place, arm in enumerate(arms)
        ),
        budgets=budgets,
        measurements=tuple(measurements.values()),
        not_asked=(),
        handed_in=(),
        training=TrainingSettings().as_dict(),
        notes=(),
        problems=(),
        training_seconds=3600.0,
        measuring_seconds=7200.0,
        processes=2,
        command="ironmoe study --data made-up",
        settings={"data": "made-up", "checksum": "c0ffee", "models": []},
        versions={"python": "3.11.0", "ironmoe": "0.0.0", "torch": "2.0.0"},
        machine="a machine",
    )
    return facts._replace(**changes)


def made_up_rows(arms, budgets, seeds, *, gain=0.0):
    """One row for each arm, training and seed. gain: points of accuracy that models with experts
    have more."""
    return [
        _row(arm, training, seed, budget, gain)
        for training, budget in budgets.items()
        for seed in range(seeds)
        for arm in arms
    ]


def _row(arm, training, seed, budget, gain):
    shared = np.random.default_rng([seed, zlib.crc32(training.encode())])
    own = np.random.default_rng([seed, zlib.crc32(f"{arm.name} {training}".encode())])
    level = 0.62 + shared.normal(0, 0.07) + own.normal(0, 0.02) + gain / 100 * (not arm.is_dense)
    values, images = _accuracies(budget, level, own)
    smooth = np.exp(shared.normal(0, 0.2) + own.normal(0, 0.1)) * (1 if arm.is_dense else 1.6)
    values |= {"r1": 9 * smooth, "jacobian": 6 / smooth, "least_eps": 7 * smooth}
    radii = np.exp(own.normal(1.5, 0.7, LOCAL)) * smooth
    images |= {"r1": (1.2 * radii).tolist(), "least_eps": [nan, *radii[1:].tolist()]}
    for share in (1 / 64, 1 / 16, 1 / 4, 1):
        values[f"slope@{exact(share * budget.radius)}:free"] = 60 / smooth * (1.2 - share / 4)
    values[f"gamma@{exact(budget.radius)}:free"] = 0.4
    certified = np.clip(0.05 * radii - 0.1, 0, 0.4)
    values["certified radius"] = float(certified.mean())
    images["certified radius"] = certified.tolist()
    if not arm.is_dense:
        more = _routed(arm, budget, values, radii, own)
        values, images = values | more[0], images | more[1]
    return Measured(arm.name, training, seed, values, images)


def _accuracies(budget, level, rng):
    values = {"clean": 0.95 + rng.normal(0, 0.005), "clean loss": 0.2}
    right = rng.random(200) < 0.95
    images = {"clean": right.astype(float).tolist(), "margin": rng.normal(3, 1, 200).tolist()}
    strength = rng.gamma(4, level / 4, 40) * budget.radius * 2 * right[:40]
    held = {exact(r): (strength > r).astype(float) for r in budget.radii}
    for radius, row in held.items():
        images[f"pgd@{radius}"] = row.tolist()
        values[f"pgd@{radius}"] = float(row.mean())
        values[f"vmoe@{radius}"] = float(row.mean()) * 0.98
        values[f"vmoe@{radius}:changed"] = 1 - float(row.mean())
        values[f"vmoe-clipped@{radius}"] = 0.5 + float(row.mean()) / 2
    values["auc"] = float(np.mean([0.95, *(row.mean() for row in held.values())]))
    at = exact(budget.radius)
    values |= {f"apgd-ce@{at}": values[f"pgd@{at}"] - 0.02, f"apgd-t@{at}": values[f"pgd@{at}"] / 2}
    return values, images


def _routed(arm, budget, known, radii, rng):
    at, many = exact(budget.radius), log2(arm.experts)
    gates = 1.0 if arm.renormalize or arm.experts == arm.top_k else 1.2 / many
    distance = np.exp(rng.normal(0, 0.4, LOCAL))
    swap = np.exp(rng.normal(-2.5, 0.6, LOCAL)) / many
    jump = np.exp(rng.normal(-4, 0.4, LOCAL)) * gates
    if arm.experts == arm.top_k:
        swap, jump = np.full(LOCAL, nan), np.zeros(LOCAL)
    values = {
        **{"gate_sum": gates, "load_entropy": 0.8 * arm.experts, "dormant": 0.0},
        **{"gate_share": 0.1 + 0.02 * many, "top_distance": float(distance.mean())},
        **{"swap": float(np.median(swap)), "jump": float(jump.mean())},
        **{f"swap@{r}": float((swap <= float(r)).mean()) for r in ("0.1", "0.25", "1", "4")},
        f"gamma@{at}:frozen": 0.3,
        f"gamma@{at}:share": 0.25 + rng.normal(0, 0.05),
    }
    for share in (1 / 64, 1 / 16, 1 / 4, 1):
        r = exact(share * budget.radius)
        values[f"slope@{r}:frozen"] = 0.9 * known[f"slope@{r}:free"]
    for mode in ("free", "auxiliary", "frozen", "gates", "experts", "replayed"):
        values[f"{mode}@{at}"] = min(1.0, known[f"pgd@{at}"] + abs(rng.normal(0, 0.05)))
    values |= {f"rerouted@{at}": 0.9, f"rerouted@{at}:changed": 0.06 + many / 100}
    own, lists = 0.95 + rng.normal(0, 0.01), {}
    for policy in ("none", *POLICIES):
        off = 0 if policy == "none" else abs(rng.normal(0.01, 0.01))
        for on in ("clean", "attacked"):
            key = f"{policy}:{on}"
            lists[key] = [1.0] * (200 if on == "clean" else 30)
            values |= {key: own - off, f"{key}:changed": 2 * off, f"{key}:kl": off**2}
    values |= {f"routing@0:kept:{layer}": 0.0 for layer in LAYERS} | {"routing@0:kept": 0.0}
    for radius in budget.radii:
        change = (1 - 1 / many) * (1 - np.exp(-radius / budget.radius) + abs(rng.normal(0, 0.02)))
        for name, size in (("routing", 1.0), ("routing noise", 0.25)):
            of_layers = {f"{name}@{exact(radius)}:kept:{each}": size * change for each in LAYERS}
            values |= of_layers | {f"{name}@{exact(radius)}:kept": size * change}
    images = {"top_distance": distance, "swap": swap, "jump": jump}
    lists[f"free@{at}"] = [1.0] * 30
    return values, lists | {name: row.tolist() for name, row in images.items()}


class MadeUp:
    """What a page is made from."""

    def __init__(self, names, seeds, trainings, gain, changes):
        self.arms = [LADDER[name] for name in names]
        self.facts = made_up_facts(self.arms, trainings, **changes)
        self.rows = made_up_rows(self.arms, self.facts.budgets, seeds, gain=gain)


@pytest.fixture(scope="session")
def made_up():
    def make(names=("dense", "E2", "E8"), *, seeds=3, trainings=("standard",), gain=0.0, **changes):
        return MadeUp(names, seeds, trainings, gain, changes)

    return make


class Page(HTMLParser):
    """text: of all elements; tags: of the body; sources: of pictures; tables by the heading above
    them, those of one heading one after another."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.sources = "", set(), []
        self._tables, self._heading, self._row, self._open = {}, "", None, []
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        if tag in ("meta", "img"):
            self.sources += [value for name, value in attributes if name == "src"]
            return
        self._open.append(tag)
        self.tags.add(tag)
        if tag in ("h1", "h2", "h3"):
            self._heading = ""
        elif tag == "tr":
            self._row = []
        elif tag in ("td", "th"):
            self._row.append("")

    def handle_endtag(self, tag):
        self._open.pop()
        if tag == "tr":
            is_header = "thead" in self._open
            self._tables.setdefault(self._heading, []).append((is_header, self._row))
            self._row = None

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += " " + data
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self._heading += data
        if self._row:
            self._row[-1] = " ".join(f"{self._row[-1]} {data}".replace("\xa0", " ").split())

    def table(self, heading, *, with_headers=False, part=False):
        """The rows of cells under a heading; part: under all headings that contain the text."""
        names = [name for name in self._tables if (heading in name if part else heading == name)]
        rows = [row for name in names for row in self._tables[name]]
        headers = [row for is_header, row in rows if is_header][:1]
        return headers * with_headers + [row for is_header, row in rows if not is_header]

    def has_header(self, text):
        rows = [row for rows in self._tables.values() for is_header, row in rows if is_header]
        return any(text in row for row in rows)


@pytest.fixture(scope="session")
def read_page():
    return lambda file: Page(file.read_text())
