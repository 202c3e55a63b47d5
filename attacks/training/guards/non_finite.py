"""A loss that is NaN or infinite: at which step, and which layer made the first such number."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ironmoe.attacks.engine.borrow import in_eval_mode
from ironmoe.attacks.training.inner.lent import leaving_nothing
from ironmoe.kernels.topk import NaNLogits
from ironmoe.moe.sharded import is_sharded


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite.

    layer: the first module whose output is not finite, "" where every output is
    step: the number of the batch, from 0
    """

    def __init__(self, layer: str, step: int, value: float) -> None:
        self.layer = layer
        self.step = step
        place = (
            f"the output of {layer!r} is the first that is not finite"
            if layer
            else "the outputs of all layers are finite"
        )
        super().__init__(
            f"the loss must be finite, got {value} at step {step}; {place}. The weights are still "
            "those before this update: take a lower learning rate, or clip gradients"
        )


def check_finite(loss: Tensor, model: nn.Module, ask: Callable[[], object], step: int) -> None:
    """NonFiniteLoss: the loss () is not finite. ``ask`` runs the model on the images of this step.
    The host waits for the device."""
    if not bool(loss.isfinite()):
        raise NonFiniteLoss(first_non_finite_layer(model, ask), step, float(loss.detach()))


def first_non_finite_layer(model: nn.Module, ask: Callable[[], object]) -> str:
    """The name of the module whose output is the first that is not finite, of the innermost one
    where modules contain each other; "" where there is none.

    ``ask`` makes a forward pass of the model and leaves its mode as it is: it is asked in eval
    mode, and, where every output is finite there, once more in the mode in which it trains. The
    host waits for the device. In a sharded model every process would have to take part, so there
    it is "".
    """
    if is_sharded(model):
        return ""
    found: list[str] = []

    def look(name: str, module: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if not found and not all(bool(each.isfinite().all()) for each in _floats(output)):
                found.append(name)

        return module.register_forward_hook(hook)

    handles = [look(name, module) for name, module in model.named_modules() if name]
    try:
        for mode in (in_eval_mode, leaving_nothing):
            eager = torch.compiler.set_stance("force_eager")
            # A router of this library ends the pass on CPU where its logits are NaN.
            with mode(model), torch.no_grad(), eager, suppress(NaNLogits):
                ask()
            if found:
                break
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(found), "")


def _floats(output: object) -> list[Tensor]:
    """The float tensors of a module's output, of a tuple or a dict that has them."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in _floats(value)]
    return []
