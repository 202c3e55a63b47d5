"""A figure of the report: how it is drawn, what it is drawn from, and what it shows in words."""

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.figure import Figure

from ironmoe.bench.study.claims.parts.words import listed
from ironmoe.bench.study.report.runs import StudyRuns


class StudyFigure(NamedTuple):
    """name: of its file; title: the heading above it; needs: the names of numbers, without radius
    and layer, without which there is nothing to draw, none if it is not drawn from runs;
    of_experts: whether there is nothing to see in dense models alone; draw: None if the runs do not
    have what it takes; caption: what one sees, with its numbers, for runs of which it was drawn;
    wants: what there is none of where all of that is there and nothing could be drawn."""

    name: str
    title: str
    needs: tuple[str, ...]
    of_experts: bool
    draw: Callable[[StudyRuns], Figure | None]
    caption: Callable[[StudyRuns], str]
    wants: str = "arm with finite numbers"

    def drawn(self, runs: StudyRuns) -> Figure | None:
        """None if ``reason`` says why not."""
        if self.needs and not any(runs.has(name) for name in self.needs):
            return None
        return None if self.of_experts and not _has_experts(runs) else self.draw(runs)

    def reason(self, runs: StudyRuns) -> str:
        """Why it is not there, where ``drawn`` gave None."""
        if self.of_experts and not _has_experts(runs):
            return "no arm has experts"
        absent = [name for name in self.needs if not runs.has(name)]
        if absent:
            return f"no run has {listed([f'“{name}”' for name in absent], 'or')}"
        return f"there is no {self.wants}"


def _has_experts(runs: StudyRuns) -> bool:
    return any(not arm.is_dense for arm in runs.arms)
