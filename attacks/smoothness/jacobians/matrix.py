"""The Jacobian itself, for small models, and how much of it goes through gates.

Shape suffixes: B images, C classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.extra import Extra
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.smoothness.asking import Asked, asked_about, chunks
from ironmoe.attacks.smoothness.jacobians.linearised import largest_singular_values, linearised
from ironmoe.attacks.smoothness.routing_held import check_reachable, check_routing
from ironmoe.attacks.smoothness.separate import measured


@dataclass(repr=False)
class NetworkTerms:
    """Of B images, how much of the derivative of the logits goes through gates: J is that of the
    model, J_e that with experts and gates as constants. All (B,) float64.

    frobenius, spectral:             ‖J‖_F and ‖J‖₂
    gates_frobenius, gates_spectral: ‖J − J_e‖_F and ‖J − J_e‖₂; 0 for a model that routes nothing
    """

    frobenius: Tensor
    spectral: Tensor
    gates_frobenius: Tensor
    gates_spectral: Tensor

    @property
    def frobenius_share(self) -> Tensor:
        """(B,) ‖J − J_e‖_F / ‖J‖_F; 0 where the model is constant."""
        return torch.where(self.frobenius > 0, self.gates_frobenius / self.frobenius, 0)

    @property
    def spectral_share(self) -> Tensor:
        """(B,) ‖J − J_e‖₂ / ‖J‖₂; 0 where the model is constant. The share may be above 1: the two
        parts can cancel."""
        return torch.where(self.spectral > 0, self.gates_spectral / self.spectral, 0)

    def __repr__(self) -> str:
        """What to read first, in place of all the tensors."""
        share = self.frobenius_share
        median = f", median share of the gates {float(share.median()):.3g}" if len(share) else ""
        return f"NetworkTerms({len(share)} images{median})"


def jacobian_matrix(
    model: Any,
    x: Tensor,
    *,
    routing: str = "free",
    batch_size: int = 64,
    extra: Extra | None = None,
) -> Tensor:
    """(B, C, …) the gradient of every logit with respect to every pixel, by C backward passes. The
    arguments and errors are those of ``jacobian``. For no image it is (0, 0, …)."""
    check_counts(1, batch_size=batch_size)
    check_routing(routing, model)
    asked, x = asked_about(model, x, extra)
    with measured(asked, x):
        parts = [
            _rows(asked.part(places), x[places], routing) for places in chunks(len(x), batch_size)
        ]
    return torch.cat(parts) if parts else x.new_zeros(0, 0, *x.shape[1:])


def network_terms(
    model: Any, x: Tensor, *, batch_size: int = 64, extra: Extra | None = None
) -> NetworkTerms:
    """How much of the Jacobian of a network goes through gates, by 2 C backward passes.

    What is left with constant gates and what is left with constant experts add up to the Jacobian
    in one layer (``layer_terms``), and not in a network, where a change of a gate changes the
    tokens of later layers, too. So the network is compared with and without its gates.

    Args:
        model, x, batch_size, extra: as in ``jacobian``; all C rows are computed, whatever C is.

    Returns:
        ``NetworkTerms``.

    Raises:
        ValueError, TypeError: as ``jacobian``; a Soft MoE, which has no gates of chosen experts;
            a model that is no nn.Module, which may hide its gates.
    """
    check_counts(1, batch_size=batch_size)
    asked, x = asked_about(model, x, extra)
    check_reachable(model, "to see what goes through gates")
    parts = []
    with measured(asked, x):
        for places in chunks(len(x), batch_size):
            part = asked.part(places)
            whole = _rows(part, x[places], "free")
            through_gates = whole - _rows(part, x[places], "gates_frozen")
            parts.append((*_norms(whole), *_norms(through_gates)))

    nothing = torch.zeros(0, dtype=torch.float64, device=x.device)
    parts = parts or [(nothing, nothing, nothing, nothing)]
    return NetworkTerms(*map(torch.cat, zip(*parts, strict=True)))


def _rows(asked: Asked, x: Tensor, routing: str) -> Tensor:
    with linearised(asked, x, routing) as at:
        return at.rows()


def _norms(rows_BCX: Tensor) -> tuple[Tensor, Tensor]:
    """(Frobenius norms, spectral norms), both (B,) float64."""
    return rows_BCX.flatten(1).double().norm(dim=1), largest_singular_values(rows_BCX)
