"""How smooth a model is, and where its routing makes it jump.

``routing_held`` says how a measurement lets a model route; every other file measures one thing.
``jacobians/`` has derivatives, of models and of their layers; ``bounds/`` what holds on a domain
that is named. docs/smoothness.md says what each is good for.
"""

from ironmoe.attacks.smoothness.bounds.activation_slopes import activation_slope
from ironmoe.attacks.smoothness.bounds.clusters import ClusterRow, clusters_experiment
from ironmoe.attacks.smoothness.bounds.forced_cell import (
    LayerBound,
    forced_cell_bound,
    layer_norm_radius,
)
from ironmoe.attacks.smoothness.jacobians.jacobian import LocalSmoothness, jacobian
from ironmoe.attacks.smoothness.jacobians.layer_terms import Boundary, LayerTerms, layer_terms
from ironmoe.attacks.smoothness.jacobians.matrix import (
    NetworkTerms,
    jacobian_matrix,
    network_terms,
)
from ironmoe.attacks.smoothness.linearity import LocalLinearity, local_linearity
from ironmoe.attacks.smoothness.routing_held import ROUTINGS, held_routing, is_routed
from ironmoe.attacks.smoothness.slopes import SlopeProfile, slope_profile
from ironmoe.attacks.smoothness.stability import Stability, stability
from ironmoe.attacks.smoothness.swaps.boundaries import BoundaryProfile, boundary_profile
from ironmoe.attacks.smoothness.swaps.jumps import SwapJumps, swap_jumps
from ironmoe.attacks.smoothness.swaps.nearest import LayerSwaps, Swaps, nearest_swaps

__all__ = [
    "ROUTINGS",
    "Boundary",
    "BoundaryProfile",
    "ClusterRow",
    "LayerBound",
    "LayerSwaps",
    "LayerTerms",
    "LocalLinearity",
    "LocalSmoothness",
    "NetworkTerms",
    "SlopeProfile",
    "Stability",
    "SwapJumps",
    "Swaps",
    "activation_slope",
    "boundary_profile",
    "clusters_experiment",
    "forced_cell_bound",
    "held_routing",
    "is_routed",
    "jacobian",
    "jacobian_matrix",
    "layer_norm_radius",
    "layer_terms",
    "local_linearity",
    "nearest_swaps",
    "network_terms",
    "slope_profile",
    "stability",
    "swap_jumps",
]
