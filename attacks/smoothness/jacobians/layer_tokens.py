"""One routed layer on tokens that it got: run again, and differentiated.

Shape suffixes: T tokens, D their width, K choices, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ironmoe.kernels import Routing
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.wrapped import unwrapped
from ironmoe.moe.routing.callbacks import attached
from ironmoe.moe.routing.gates import with_sum
from ironmoe.moe.routing.routed_layers import Decision, RoutedLayer


@dataclass
class LayerTokens:
    """A routed layer, some tokens (T, D) that it got, and what was decided about them.

    block: what turns tokens into tokens: the layer itself, or the block of a Hugging Face model
        around its router and its experts
    intended, carried_out: the routing before and after a capacity
    logits: (T, E), or None where the router does not tell them
    """

    site: RoutedLayer
    block: nn.Module
    inputs: Tensor
    intended: Routing
    carried_out: Routing
    logits: Tensor | None

    def outputs(self, x_TD: Tensor, *, constant_gates: bool) -> Tensor:
        """(T, D) what the layer makes of ``x_TD`` with the experts of its tokens, drops included.

        constant_gates: the gates are those of its tokens; else the router weighs anew.

        Raises:
            ValueError: at the layer's own tokens the router decides otherwise than it did, because
                they are alone here.
        """
        decisions: list[Decision] = []

        def before(decision: Decision) -> Routing:
            decisions.append(decision)
            return decision.routing

        def after(_: Decision) -> Routing:
            return self.carried_out if constant_gates else self._fresh(decisions[-1])

        name = self.site.name
        with attached({name: self.site}, {name: before}, {}, {name: after}):
            y = self.block(x_TD[:, None])  # images of one token each, for those who count images
        if not constant_gates:
            self._check(decisions)
        return (y if isinstance(y, Tensor) else y[0]).flatten(0, -2)

    def jacobian(self, *, constant_gates: bool) -> Tensor:
        """(T, D, D) of each output feature with respect to each input feature, token by token, by D
        backward passes. Tokens do not influence each other here."""
        point = self.inputs.detach().requires_grad_()
        with torch.enable_grad():
            y_TD = self.outputs(point, constant_gates=constant_gates)
        rows = []
        for feature in range(y_TD.shape[1]):
            (row,) = torch.autograd.grad(y_TD[:, feature].sum(), [point], retain_graph=True)
            rows.append(row)
        return torch.stack(rows, 1)

    def _fresh(self, decision: Decision) -> Routing:
        """The router's own gates, of choices that were carried out."""
        dropped_TK = self.carried_out.experts >= self.site.num_experts
        gates_TK = decision.routing.gates.masked_fill(dropped_TK, 0)
        module = self.site.module
        capacity = module.capacity if isinstance(module, MoE) else None
        if capacity is not None and getattr(unwrapped(capacity), "renormalize", False):
            gates_TK = with_sum(gates_TK, 1)
        return Routing(gates_TK, self.carried_out.experts)

    @torch.no_grad()
    def _check(self, decisions: list[Decision]) -> None:
        """ValueError unless the layer decided once, as it had decided."""
        wrong = f"ran {len(decisions)} times"
        if len(decisions) == 1:
            (decision,) = decisions
            gates_TK = self._fresh(decision).gates
            if not _near(decision.x, self.inputs):
                wrong = "changes the tokens on their way to the experts"
            elif not torch.equal(decision.routing.experts.long(), self.intended.experts.long()):
                wrong = "chooses other experts"
            elif not _near(gates_TK, self.carried_out.gates):
                wrong = "gives other gates"
            else:
                return
        raise ValueError(
            "layers must decide about each token by itself to be differentiated token by token, "
            f"got {self.site.name!r}, which {wrong} when it gets some of its tokens again"
        )


def block_of(model: nn.Module, site: RoutedLayer) -> nn.Module:
    """What turns the tokens of a routed layer into tokens: an ``MoE``, or the module that owns both
    router and experts of a Hugging Face model. ValueError: it is not found."""
    if isinstance(site.module, MoE):
        return site.module
    for module in model.modules():
        children = list(module.children())
        if all(any(child is part for child in children) for part in (site.module, site.router)):
            return module
    raise ValueError(
        f"layers must have a block that owns both router and experts, got {site.name!r}, where it "
        "is not found"
    )


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether they differ by rounding at most, which depends on how many tokens run together."""
    if a.shape != b.shape:
        return False
    rounding = 100 * torch.finfo(b.dtype).eps
    scale = float(b.abs().max()) if b.numel() else 0.0
    return torch.allclose(a.to(b), b, rtol=rounding, atol=rounding * scale)
