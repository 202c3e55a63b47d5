"""Attack a model over a data set and report what held, with confidence intervals."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack, AttackResult, Model
from ironmoe.attacks.proportion import Proportion

Batches = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


@dataclass
class AttackSummary:
    """One attack over the whole data set. Tensors are on CPU, in the order of the data.

    robust: (N,) bool; adversarial: (N, …) or None if not kept; seconds of wall-clock time
    """

    robust: Tensor
    adversarial: Tensor | None
    seconds: float
    forwards: int
    backwards: int

    @property
    def robust_accuracy(self) -> Proportion:
        return Proportion(int(self.robust.sum()), len(self.robust))

    @property
    def images_per_second(self) -> float:
        return len(self.robust) / self.seconds if self.seconds else float("nan")


@dataclass
class RobustnessReport:
    """``clean_correct`` (N,) bool, and a summary of every attack by name."""

    clean_correct: Tensor
    attacks: dict[str, AttackSummary] = field(default_factory=dict)

    @property
    def clean_accuracy(self) -> Proportion:
        return Proportion(int(self.clean_correct.sum()), len(self.clean_correct))

    @property
    def worst_case(self) -> Proportion:
        """Right on the clean image and under every attack: the number to report for the set of attacks."""
        robust = self.clean_correct.clone()
        for summary in self.attacks.values():
            robust &= summary.robust
        return Proportion(int(robust.sum()), len(robust))

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {
            "clean": self.clean_accuracy.as_dict(),
            "worst_case": self.worst_case.as_dict(),
            "attacks": {
                name: {
                    "robust": summary.robust_accuracy.as_dict(),
                    "seconds": summary.seconds,
                    "images_per_second": summary.images_per_second,
                    "forwards": summary.forwards,
                    "backwards": summary.backwards,
                }
                for name, summary in self.attacks.items()
            },
        }


def evaluate(
    model: Model,
    data: Batches,
    attacks: Mapping[str, Attack] | Sequence[Attack],
    *,
    batch_size: int = 256,
    keep_adversarial: bool = False,
    on_progress: Callable[[str, int], None] | None = None,
) -> RobustnessReport:
    """Run every attack on every example.

    Args:
        model: the model the attacks were made for; named again so that no report mixes two models.
        data: (images (N, …), labels (N,)), cut here into batches; or an iterable of such batches, such as a DataLoader that
            gives the same order each time.
        attacks: name → attack, each with a single eps; or a list of attacks, named by what they print.
        batch_size: for a pair of tensors. Random starts depend on the example's place in the data, not on batches.
        keep_adversarial: keep the final images in the report.
        on_progress: called with (attack name, number of images just finished).

    Raises:
        ValueError: no attack, an attack for another model, no data, or a bad input (see ``Attack.run``).
    """
    if not isinstance(attacks, Mapping):
        attacks = {repr(attack): attack for attack in attacks}
    if not attacks:
        raise ValueError("attacks must hold at least one attack, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for name, attack in attacks.items():
        if attack.model is not model:
            raise ValueError(f"attacks[{name!r}] must be made for the model that is evaluated, got one for another model")
        if isinstance(attack.eps, Tensor) and attack.eps.ndim:
            raise ValueError(f"attacks[{name!r}] must have a single eps, got one an example")
    report: RobustnessReport | None = None
    for name, attack in attacks.items():
        results: list[AttackResult] = []
        start, first = time.perf_counter(), 0
        for images, labels in _batches(data, batch_size):
            indices = torch.arange(first, first + len(images), device=images.device)
            try:
                result = attack.run(images, labels, indices)
            except (ValueError, TypeError) as error:
                raise type(error)(f"in data {first} … {first + len(images) - 1}: {error}") from error
            if not keep_adversarial:
                result.adversarial = result.adversarial[:0]
            results.append(result)
            first += len(images)
            if on_progress is not None:
                on_progress(name, len(images))
        if not first:
            raise ValueError("data must hold at least one example, got none")
        report = report or RobustnessReport(torch.cat([r.clean_correct.cpu() for r in results]))
        report.attacks[name] = AttackSummary(
            robust=torch.cat([r.robust.cpu() for r in results]),
            adversarial=torch.cat([r.adversarial.cpu() for r in results]) if keep_adversarial else None,
            seconds=time.perf_counter() - start,
            forwards=sum(int(r.forwards.sum()) for r in results),
            backwards=sum(int(r.backwards.sum()) for r in results),
        )
    assert report is not None
    return report


def _batches(data: Batches, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) and isinstance(data[1], Tensor):
        yield from zip(data[0].split(batch_size), data[1].split(batch_size), strict=True)
    else:
        yield from data  # type: ignore[misc]  # an iterable of batches
