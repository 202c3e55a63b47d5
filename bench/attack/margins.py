"""How far the images that held are from falling."""

import torch
from torch import Tensor, nn

from ironmoe.attacks import AttackSummary, RobustnessReport


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
