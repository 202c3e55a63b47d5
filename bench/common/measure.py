"""Measure a trained model: clean and robust accuracy over eps, signs of false security, images that
fell, and what the attack does to its routing.

Numbers are plain ones, ready for JSON.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks import PGD, AttackSummary, Proportion, evaluate
from ironmoe.attacks.balls.ball import Ball
from ironmoe.bench.common.radii import all_from_255, from_255
from ironmoe.moe import routing_change, trace_routing

NUM_EXAMPLES = 6  # images that a report shows
Numbers = dict[str, Any]


class AttackSettings(NamedTuple):
    """The attack of a report.

    eps_255: radii in units of 1/255 of the pixel range, ascending; alpha: step length in units of
    the pixel range, None for PGD's own; images: how many to attack; routing_images: on how many of
    them the routing is measured.
    """

    norm: str = "Linf"
    eps_255: tuple[float, ...] = Ball.usual_radii
    steps: int = 20
    restarts: int = 2
    alpha: float | None = None
    images: int = 500
    routing_images: int = 250
    batch_size: int = 500

    def describe(self) -> str:
        """The attack in one line."""
        step = "max(2.5/steps, 1/10)·eps" if self.alpha is None else f"{self.alpha:g}"
        return (
            f"PGD-{self.steps} {self.norm}, random start, {self.restarts} "
            f"restart{'s' * (self.restarts > 1)}, step {step}, "
            "cross-entropy, best iterate kept"
        )


def _pgd(model: nn.Module, eps_255: float, settings: AttackSettings, **options: Any) -> PGD:
    return PGD(
        model,
        from_255(eps_255),
        settings.alpha,
        settings.steps,
        norm=settings.norm,
        **options,
    )


def measure_clean(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Numbers:
    """Clean accuracy, the chance level and the speed of the forward pass, as numbers for JSON.

    The chance level is what one answer to every image gets at best, and at least what random
    answers among the model's classes get.
    """
    device = next(model.parameters()).device
    start, logits = time.perf_counter(), []
    with torch.no_grad():
        for x in images.split(batch_size):
            logits.append(model(x.to(device)).cpu())
    seconds = time.perf_counter() - start

    answers = torch.cat(logits)
    most_frequent = int(labels.bincount().max()) / len(labels)
    return {
        "clean": Proportion(int((answers.argmax(1) == labels).sum()), len(labels)).as_dict(),
        "chance": max(1 / answers.shape[1], most_frequent),
        "classes": answers.shape[1],
        "images_per_second": len(labels) / seconds,
    }


def measure_robust(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: AttackSettings,
    *,
    seed: int,
    attack_dtype: torch.dtype | None,
    journal: Path,
    on_images: Callable[[int], None],
) -> tuple[Numbers, dict[str, Tensor]]:
    """Robust accuracy at every eps, what the checks against false security say, and some images
    that fell.

    An image leaves as soon as it is misclassified and is not attacked at larger eps: the verdict is
    the same, only sooner. What is found goes to the journal, and an interrupted call goes on from
    there.

    Args:
        attack_dtype: of the search, under autocast; None is float32.
        on_images: called with the number of images that are decided so far.

    Returns:
        (numbers for JSON: "attacks", an entry for each eps, and "checks", those of ``evaluate``;
        up to ``NUM_EXAMPLES`` images that fell: "number" (n,) int64 among the images, "clean" and
        "adversarial" (n, C, S, S), "label" and "prediction" (n,) int64, "fell_at_255" (n,) in
        units of 1/255)
    """
    attack = _pgd(
        model,
        settings.eps_255[-1],
        settings,
        seed=seed,
        attack_dtype=attack_dtype,
        restarts=settings.restarts,
    )
    report = evaluate(
        model,
        (images, labels),
        {"pgd": attack},
        eps=all_from_255(settings.eps_255),
        batch_size=settings.batch_size,
        journal=journal,
        keep_adversarial="journal",
        on_progress=lambda progress: on_images(progress.decided),
    )
    summary = report.attacks["pgd"]

    # One queue serves every eps: each gets an equal part of the time.
    cost = {
        "seconds": report.seconds / len(settings.eps_255),
        "forwards": summary.forwards,
        "backwards": summary.backwards,
    }
    attacks = [
        {"eps_255": eps, "robust": share.as_dict()} | cost
        for eps, share in zip(settings.eps_255, summary.curve.values(), strict=True)
    ]
    checks = [flag.as_dict() for flag in report.checks]
    return {"attacks": attacks, "checks": checks}, _fallen(summary, images, labels, settings)


def _fallen(
    summary: AttackSummary, images: Tensor, labels: Tensor, settings: AttackSettings
) -> dict[str, Tensor]:
    """Up to ``NUM_EXAMPLES`` images that fell, evenly spread from those that fell first (at the
    smallest eps, the nearest first) to those that fell last.

    summary: with final images that are kept; images, labels: all that were attacked.
    """
    fell = summary.fell.nonzero().squeeze(1).tolist()
    fell.sort(key=lambda place: (float(summary.fell_at[place]), float(summary.distance[place])))
    count = min(NUM_EXAMPLES, len(fell))
    spread = [fell[round(i * (len(fell) - 1) / max(1, count - 1))] for i in range(count)]

    radii = {from_255(eps): eps for eps in settings.eps_255}
    places = torch.tensor(spread, dtype=torch.int64)
    numbers = summary.examples[places]
    return {
        "number": numbers,
        "clean": images[numbers],
        "adversarial": summary.final(places) if count else images[numbers],
        "label": labels[numbers],
        "prediction": summary.prediction[places],
        "fell_at_255": torch.tensor([radii[at] for at in summary.fell_at[places].tolist()]),
    }


def measure_routing(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps_255: float,
    settings: AttackSettings,
    *,
    seed: int,
    attack_dtype: torch.dtype | None,
) -> Numbers:
    """What the attack does to the routing of clean and adversarial images, as numbers for JSON.

    Here the attack runs its full length on every image, as the paper's does: one that stops at the
    first misclassification would perturb, and reroute, less. Images misclassified from the start
    are not attacked and not counted, unless a capacity ties the images of a batch together. Change
    is the "kept" reading: tokens that the capacity dropped both times are left out.

    Args:
        images: (N, C, S, S) in [0, 1]; labels: (N,) int64.
        eps_255: the radius in units of 1/255.
    """
    device = next(model.parameters()).device
    images, labels = images.to(device), labels.to(device)
    attack = _pgd(
        model,
        eps_255,
        settings,
        seed=seed,
        attack_dtype=attack_dtype,
        restarts=1,
        early_stop=False,
    )
    result = attack.run(images, labels)

    # under a capacity a group stays whole, also with images that are misclassified
    attacked = result.clean_correct | attack.coupled_by_model_or_loss
    batches = images[attacked], result.adversarial[attacked]
    return {
        "eps_255": eps_255,
        "images": int(attacked.sum()),
        "layers": _routing_of_layers(model, *batches) if bool(attacked.any()) else {},
    }


@torch.no_grad()
def _routing_of_layers(model: nn.Module, clean: Tensor, adversarial: Tensor) -> dict[str, Numbers]:
    """For each MoE layer, how much the routing changes, and the load of each expert."""
    traces = []
    for batch in (clean, adversarial):
        with trace_routing(model) as trace:
            model(batch)
        traces.append(trace)

    before, after = (trace.layers for trace in traces)
    return {
        name: {
            "change": routing_change(before[name], after[name], "kept"),
            "load_clean": before[name].load().tolist(),
            "load_adversarial": after[name].load().tolist(),
        }
        for name in before
    }
