"""Checks of a model's gradients: whether they are those of the model, vanish, or reach the routers.

``model_checks`` runs them, beside its checks of the model's answers.
"""

import torch
from torch import Tensor, nn

from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.evaluation.checks.sample import FINE, Sample, no_gradient
from ironmoe.attacks.evaluation.report import Flag
from ironmoe.attacks.goals.labels import LabelGoal
from ironmoe.attacks.model_errors import NoGradient
from ironmoe.moe import trace_routing
from ironmoe.moe.routing.routed_layers import routing_sites

# A gradient of the margin with respect to router logits, divided by the margin: less is rounding.
GRADIENT_ROUNDING = 1e-6


def zero_gradients(sample: Sample, outputs: Tensor, bounds: Bounds) -> Flag:
    """Whether the loss has a gradient at all where an attack would begin: of labels, the
    cross-entropy at correctly classified images; of another goal, whose loss may have its minimum
    there, its loss a little beside them."""
    name = "zero gradients"
    if not sample.goal.has_loss:
        return Flag.not_looked_at(name, f"{sample.goal} has no loss.")
    goal = sample.goal
    points = sample.images if goal.has_classes else sample.nearby(FINE, bounds)
    try:
        _, grad = sample.ask(lambda out: goal.loss(out, sample.labels), points)
    except NoGradient as error:
        return no_gradient(name, error)

    attacked = ~goal.reached(outputs, sample.labels)
    zero = ((grad.flatten(1) == 0).all(1) | ~grad.flatten(1).isfinite().all(1)) & attacked
    share = float(zero.sum()) / max(int(attacked.sum()), 1)
    loss = f"loss of {goal}"
    if isinstance(goal, LabelGoal) and goal.usual_loss == "ce":
        loss = "cross-entropy"
    return Flag(
        name,
        share > 0,
        share,
        f"At {100 * share:.0f} % of the images to attack the {loss} has a gradient of exactly 0. "
        + (
            "Attacks on it stand still there: use another loss, such as the margin or DLR of "
            "logits, and Square."
            if share
            else "None stands still."
        ),
    )


def routing_gradient(sample: Sample) -> Flag:
    """Whether the margin has a gradient with respect to the logits of every router."""
    name = "routing gradient blocked"
    model = sample.model.model
    if not isinstance(model, nn.Module) or not routing_sites(model):
        return Flag.not_looked_at(name, "the model has no routing that is known here.")

    points = sample.images.detach().requires_grad_()
    try:
        with torch.enable_grad(), trace_routing(model, keep_graph=True) as trace:
            # The gradient of the margin does not vanish where the model is sure.
            heights = sample.height(sample.outputs_with_graph(points))
    except NoGradient as error:
        return no_gradient(name, error)
    loss = heights.sum()
    least = GRADIENT_ROUNDING * float(heights.detach().abs().max())

    layers = {
        layer: [logits for logits in seen.all_logits if logits is not None]
        for layer, seen in trace.layers.items()
    }
    blocked = [layer for layer, seen in layers.items() if seen and not _reaches(loss, seen, least)]

    share = len(blocked) / max(len(layers), 1)
    return Flag(
        name,
        bool(blocked),
        share,
        f"No gradient reaches the routers of {', '.join(blocked)}: an attack cannot see how to "
        "reroute tokens. Use routing=StraightThrough()."
        if blocked
        else "Gradients reach every router.",
    )


def _reaches(loss: Tensor, logits: list[Tensor], least: float) -> bool:
    """Whether a gradient of the loss with respect to these router logits has an entry above
    ``least``. A gate that is always 1, the one choice of K = 1 renormalised, leaves no more than
    rounding errors of a gradient."""
    wanted = [value for value in logits if value.requires_grad]
    if not wanted or not loss.requires_grad:
        return False
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    return any(grad is not None and float(grad.abs().max()) > least for grad in grads)
