"""What the model itself is asked once the attacks are over: how far the images that held are from
falling, and what an attack does to the routing."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks import AttackSummary, RobustnessReport
from ironmoe.attacks.engine.coupling import images_per_unit
from ironmoe.bench.attack.attacked_images import AttackedImages
from ironmoe.bench.attack.meter import Meter
from ironmoe.bench.attack.options import AttackOptions
from ironmoe.bench.attack.suite import DTYPES
from ironmoe.bench.common.measure import AttackSettings, measure_routing
from ironmoe.bench.common.processes import Processes
from ironmoe.bench.common.radii import exact
from ironmoe.moe.distributed import in_step
from ironmoe.moe.routing.routed_layers import routing_sites


class Asked(NamedTuple):
    """What came out.

    margins: of ``margins_left``; None without all final images; routing: of ``measure_routing``,
    for each eps.
    """

    margins: Tensor | None
    routing: list[dict[str, Any]]


def ask_again(
    model: nn.Module,
    options: AttackOptions,
    images: AttackedImages,
    report: RobustnessReport,
    *,
    keeps_images: bool,
    meter: Meter | None,
    group: Processes,
) -> Asked:
    """Ask the model. All processes of the group do so in step; ``meter`` is that of the first
    one."""
    if not len(report.clean_correct):
        return Asked(None, [])
    labels = next(iter(report.attacks.values())).per_image["label"]
    margins = None
    with in_step(model):
        if keeps_images and len(labels) == len(images):
            margins = margins_left(model, report, labels, options.batch_size)
        return Asked(margins, _routing(model, options, images, report, meter, group))


def margins_left(
    model: nn.Module, report: RobustnessReport, labels: Tensor, batch_size: int
) -> Tensor:
    """(A, N): the margin of each attack's final image, which is the logit of the right class minus
    the largest other logit.

    It is NaN unless the image held to the end against every attack.
    """
    summaries = list(report.attacks.values())
    held = torch.stack([summary.robust & summary.decided for summary in summaries]).all(0)
    margins = torch.full((len(summaries), len(held)), float("nan"))
    if not bool(held.any()):
        return margins
    device = next(model.parameters(), torch.zeros(0)).device
    margins[:, held] = torch.stack(
        [_margins(model, summary, held, labels, batch_size, device) for summary in summaries]
    )
    return margins


@torch.no_grad()
def _margins(
    model: nn.Module,
    summary: AttackSummary,
    held: Tensor,
    labels: Tensor,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    places = held.nonzero().squeeze(1)
    logits = torch.cat(
        [model(summary.final(part).to(device)).float().cpu() for part in places.split(batch_size)]
    )
    right = labels[held].unsqueeze(1)
    return (
        logits.gather(1, right) - logits.scatter(1, right, float("-inf")).amax(1, keepdim=True)
    ).squeeze(1)


def _routing(
    model: nn.Module,
    options: AttackOptions,
    images: AttackedImages,
    report: RobustnessReport,
    meter: Meter | None,
    group: Processes,
) -> list[dict[str, Any]]:
    """What PGD at its full length does to the routing, at every eps.

    The list is empty for a dense model, where a budget ended the evaluation, and where no image is
    classified right.
    """
    if not routing_sites(model) or not report.complete:
        return []
    most = min(AttackSettings().routing_images, options.batch_size)
    # the first images that are right; the first of all where images depend on those beside them
    places: list[int] = report.clean_correct.nonzero().flatten()[:most].tolist()
    if images_per_unit(model, options.batch_size) > 1:
        places = list(range(min(most, len(images))))
    if not places:
        return []

    measured: list[Any] = []
    for eps_255 in options.suite.eps_255:
        name = f"results/routing{exact(eps_255)}.json"
        known = group.each(None if meter is None else meter.folder.read(name))[0]
        if known is None:
            if meter is not None:
                meter.say(f"routing at eps {exact(eps_255)}/255")
            known = _routing_at(model, options, images, eps_255, places)
            if meter is not None:
                meter.folder.write(name, known)
                known = meter.folder.read(name)
        measured.append(known)

    if meter is not None:
        meter.say("done")
    return measured if measured[0]["images"] else []


def _routing_at(
    model: nn.Module,
    options: AttackOptions,
    images: AttackedImages,
    eps_255: float,
    places: list[int],
) -> dict[str, Any]:
    suite = options.suite
    settings = AttackSettings(
        norm=suite.norm,
        eps_255=suite.eps_255,
        steps=suite.pgd_steps,
        restarts=1,
        alpha=suite.alpha,
        images=options.data.most,
    )
    pixels, labels = images.at(places)
    return measure_routing(
        model,
        pixels,
        labels,
        eps_255,
        settings,
        seed=suite.seed,
        attack_dtype=DTYPES[suite.dtype],
    )
