"""The jobs of a run on a GPU, most important first, and how long each is expected to take."""

from typing import NamedTuple

from ironmoe.bench.benchmarks.shapes import FIRST_SHAPES, MAIN, REHEARSAL, ROUTINGS, Shape

# These shapes are measured under every routing, the others under a uniform one.
UNEVEN = (MAIN.name, "vmoe-b16-e8", REHEARSAL[0].name)
# These shapes are measured before everything else.
FIRST = (MAIN.name, "vmoe-b16-e8", *(shape.name for shape in REHEARSAL))


class GpuJob(NamedTuple):
    """One piece of a run, which has a process of its own.

    kind: one of ``KINDS``; shape, routing: of the layer, if the job is about one; seconds: how long
    the job is expected to take; limit: the seconds after which it is ended.
    """

    kind: str
    shape: Shape | None = None
    routing: str = ""
    seconds: float = 0.0
    limit: float = 0.0

    @property
    def name(self) -> str:
        parts = (self.kind, self.shape.name if self.shape else "", self.routing)
        return " ".join(part for part in parts if part)


CASE = "case"
TESTS = "tests"
BLOCKS = "blocks"
BITS = "bits"
ATTACK = "attack"
SANITIZER = "sanitizer"
TUNE = "tune"
KINDS = {
    CASE: "a layer beside its peers",
    TESTS: "the tests that use the device",
    BLOCKS: "new block sizes against old ones",
    BITS: "the same bits in every run",
    ATTACK: "PGD on a whole V-MoE",
    SANITIZER: "compute-sanitizer on a small layer",
    TUNE: "better block sizes",
}
# Seconds are estimates for an H100 with 16 cores and an empty cache of compiled kernels; none was
# measured. The first number is expected, the second is the limit.
FIRST_CASE, OTHER_CASE = (45.0, 100.0), (15.0, 60.0)


def plan(
    shapes: tuple[Shape, ...], minutes: float, on_gpu: bool, kinds: tuple[str, ...]
) -> list[GpuJob]:
    """The jobs, most important first: if the minutes do not suffice, the last ones are left out."""
    all_cases = cases(shapes)
    first = [place for place in all_cases if place[0].name in FIRST and place[1] == "uniform"]
    later = [place for place in all_cases if place not in first]

    biggest = MAIN if on_gpu else REHEARSAL[0]
    share = 60 * minutes
    jobs = [
        *(GpuJob(CASE, shape, routing, *FIRST_CASE) for shape, routing in first),
        GpuJob(TESTS, None, "", min(130.0, 0.3 * share), 0.4 * share),
        GpuJob(BLOCKS, None, "", 40.0, 90.0),
        GpuJob(BITS, biggest, "", 12.0, 40.0),
        GpuJob(ATTACK, None, "", 75.0, 120.0),
        GpuJob(SANITIZER, None, "", 40.0, 90.0),
        GpuJob(TUNE, None, "", 0.4 * share, 0.4 * share),
        *(GpuJob(CASE, shape, routing, *OTHER_CASE) for shape, routing in later),
    ]

    return [job for job in jobs if job.kind in kinds]


def cases(shapes: tuple[Shape, ...]) -> list[tuple[Shape, str]]:
    """All pairs (shape, routing), most important first: the first shapes under a uniform routing,
    then some under the other routings, then the other shapes."""
    first = [(shape, "uniform") for shape in shapes if shape in FIRST_SHAPES]
    uneven = [
        (shape, routing)
        for shape in shapes
        if shape.name in UNEVEN
        for routing in ROUTINGS
        if routing != "uniform"
    ]
    return first + uneven + [(shape, "uniform") for shape in shapes if shape not in FIRST_SHAPES]
