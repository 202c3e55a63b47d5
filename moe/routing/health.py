"""Router health: a few numbers of every routed layer, cheap enough for every training step.

Shape suffixes: T tokens, K choices, E experts.
"""

import warnings
import weakref
from types import TracebackType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ironmoe.kernels import Routing
from ironmoe.kernels.route import transformed
from ironmoe.moe.adapters.huggingface_routing import are_probabilities
from ironmoe.moe.exchange.alone import is_alone
from ironmoe.moe.routing.callbacks import counting
from ironmoe.moe.routing.metrics import entropy, imbalance
from ironmoe.moe.routing.routed_layers import Decision, RoutedLayer, routing_sites

UNSEEN = (
    "RouterHealth has counted no token yet: run the model before read(), and if it ran as compiled "
    "code before RouterHealth was made, call torch.compiler.reset()"
)


class RouterHealth:
    """Counts what the routers of a model do, from now until ``close()`` or the end of its ``with``
    block: layers of this library, upcycled ones, and the experts of Hugging Face models.

    A forward pass adds to a few numbers on its device and never waits for it. Counted is what is
    carried out, after interventions and capacities; several passes add up. Padding that a mask
    names, passes that activation checkpointing repeats in the backward pass, and passes inside
    transforms of torch.func are not counted.

    Compiled models keep running as compiled code and count there. A model that ran as compiled code
    before must be compiled again (``torch.compiler.reset()``): its code knows nothing of hooks that
    came later. ``read`` warns as long as nothing was counted.

    Raises:
        ValueError: the model has no MoE layer.
        TypeError: the model is no module.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = routing_sites(model)
        if not layers:
            raise ValueError(
                f"model must have MoE layers to watch, got {type(model).__name__} with none"
            )
        self._counts = {name: _Counts(layer) for name, layer in layers.items()}
        counters = {name: counts.add for name, counts in self._counts.items()}
        stop = counting(layers, counters, model=model)
        # also when the last reference to this object goes
        self._stop = weakref.finalize(self, stop)
        self._stop.atexit = False
        self._has_counted = False

    def read(self, *, all_processes: bool = False) -> dict[str, float]:
        """The numbers of all passes since the last call, which are forgotten then. It waits for the
        device once.

        ``"blocks.1.mlp/load_imbalance"`` and so on, as TensorBoard, wandb and MLflow take them. A
        layer that got no token is left out.

        - load_imbalance: choices carried out by the busiest expert over their mean over experts: 1
          if all are equal, E if one has everything; MaxVio (arXiv 2408.15664) is this minus 1
        - dead_experts: how many experts got no token
        - load_entropy: of the load, in nats; log E if it is even
        - drop_share: the share of choices that a capacity (or a policy behind it) dropped
        - unrouted_share: the share of tokens that no expert took
        - gate_mass: the mean over tokens of the sum of their gates
        - router_entropy: of the mean over tokens of softmax(logits), in nats; log E if every expert
          is as likely
        - token_entropy: the mean over tokens of the entropy of softmax(logits); 0 if each is sure
        - max_logit: the largest logit of any token

        The last three are left out where a Hugging Face router does not return its logits.

        Args:
            all_processes: sum over the processes of ``torch.distributed``, each of which must call
                this; in a single process it changes nothing.
        """
        counts = list(self._counts.values())
        device = counts[0].sums.device
        sums = torch.cat([each.all_sums().to(device) for each in counts])
        maxima = torch.cat([each.max_logit.to(device) for each in counts])
        for each in counts:
            each.empty()

        if all_processes and not is_alone():
            dist.all_reduce(sums)
            dist.all_reduce(maxima, dist.ReduceOp.MAX)
        *sums_of_layers, maxima = (
            torch.cat([sums, maxima]).cpu().split([*(each.length for each in counts), len(counts)])
        )

        numbers: dict[str, float] = {}
        each_layer = zip(self._counts, sums_of_layers, maxima.tolist(), strict=True)
        for name, sums, max_logit in each_layer:
            prefix = f"{name}/" if name else ""
            for key, value in _numbers(sums, max_logit).items():
                numbers[prefix + key] = value

        self._has_counted = self._has_counted or bool(numbers)
        if not self._has_counted:
            warnings.warn(UNSEEN, stacklevel=2)
        return numbers

    def close(self) -> None:
        """Stop counting and take the hooks away; what was counted can still be read."""
        self._stop()

    def __enter__(self) -> "RouterHealth":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Sums(NamedTuple):
    """Sums over real tokens.

    tokens: how many there are; with_expert: how many have an expert
    choices: how many choices were made, before any was dropped
    gates: of the gates carried out
    logits: how many tokens have known logits; probabilities: how many of these have probabilities
        in their place; entropy: of their softmax
    """

    tokens: Tensor
    with_expert: Tensor
    choices: Tensor
    gates: Tensor
    logits: Tensor
    probabilities: Tensor
    entropy: Tensor


class _Counts:
    """What one layer did, as tensors on its device that only grow until they are emptied.

    load (E + 1,) int64: choices carried out by each expert; place E is for dropped ones
    sums: ``_Sums`` as one float64 tensor
    shares (E,) float64: softmax(logits), summed over tokens
    max_logit (1,) float64
    """

    def __init__(self, layer: RoutedLayer) -> None:
        tensors = [*layer.module.parameters(), *layer.module.buffers()]
        device = tensors[0].device if tensors and not tensors[0].is_meta else torch.device("cpu")
        self.num_experts = layer.num_experts
        with torch.inference_mode(False):  # training could not add to tensors made in that mode
            self.load = torch.zeros(layer.num_experts + 1, dtype=torch.int64, device=device)
            self.sums = torch.zeros(len(_Sums._fields), dtype=torch.float64, device=device)
            self.shares = torch.zeros(layer.num_experts, dtype=torch.float64, device=device)
            self.max_logit = torch.full((1,), -torch.inf, dtype=torch.float64, device=device)
        self._stay()

    @torch.no_grad()
    def add(self, decision: Decision, realised: Routing) -> None:
        if decision.x.is_meta or not len(decision.x):
            return
        if not torch.compiler.is_compiling() and transformed():
            return
        if self.load.device != decision.x.device:
            self._move(decision.x.device)

        kept_TK = self._choices(decision, realised)
        places_TK = realised.experts.long().where(kept_TK, self.num_experts).flatten()
        self.load.scatter_add_(0, places_TK, torch.ones_like(places_TK))
        # Most layers have nothing that drops.
        same = realised is decision.routing
        made_TK = kept_TK if same else self._choices(decision, decision.routing)
        wide = self.sums.dtype
        tokens = _number_of_tokens(decision).to(wide)
        known, probabilities, entropy_sum = self._add_logits(decision, tokens)
        sums = _Sums(
            tokens=tokens,
            with_expert=kept_TK.any(1).sum(dtype=wide),
            choices=made_TK.sum(dtype=wide),
            gates=realised.gates.where(kept_TK, 0).sum(dtype=wide),
            logits=known,
            probabilities=probabilities,
            entropy=entropy_sum,
        )
        self.sums.add_(torch.stack(sums))

    def _choices(self, decision: Decision, routing: Routing) -> Tensor:
        """(T, K) bool: a real token has an expert here."""
        is_expert_TK = routing.experts < self.num_experts
        return is_expert_TK if decision.mask is None else is_expert_TK & decision.mask[:, None]

    def _add_logits(self, decision: Decision, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count the logits; the last three of ``_Sums``."""
        nothing = torch.zeros_like(tokens)
        logits_TE = decision.logits
        if logits_TE is None or len(logits_TE) != len(decision.x):
            return nothing, nothing, nothing

        logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        shares_TE = logits_TE.softmax(-1)
        # A router whose rule is known here starts from logits.
        suspect_T = are_probabilities(logits_TE) if decision.gates_of is None else None
        if decision.mask is not None:
            real_T1 = decision.mask[:, None]
            shares_TE = shares_TE.where(real_T1, 0)
            logits_TE = logits_TE.where(real_T1, -torch.inf)
            suspect_T = None if suspect_T is None else suspect_T & decision.mask

        self.shares.add_(shares_TE.sum(0, dtype=self.shares.dtype))
        self.max_logit.copy_(torch.maximum(self.max_logit, logits_TE.amax()))
        suspects = nothing if suspect_T is None else suspect_T.sum(dtype=tokens.dtype)
        return tokens, suspects, entropy(shares_TE).sum(dtype=tokens.dtype)

    def all_sums(self) -> Tensor:
        """(length,) float64: all but the largest logit."""
        return torch.cat([self.sums, self.load.to(self.sums.dtype), self.shares])

    @property
    def length(self) -> int:
        """How many numbers ``all_sums`` has."""
        return len(self.sums) + len(self.load) + len(self.shares)

    def empty(self) -> None:
        self.load.zero_()
        self.sums.zero_()
        self.shares.zero_()
        self.max_logit.fill_(-torch.inf)

    def _move(self, device: torch.device) -> None:
        """The model went elsewhere after this was made."""
        with torch.inference_mode(False):
            self.load = self.load.to(device)
            self.sums = self.sums.to(device)
            self.shares = self.shares.to(device)
            self.max_logit = self.max_logit.to(device)
        if not torch.compiler.is_compiling():
            self._stay()

    def _stay(self) -> None:
        """Tell torch.compile that these tensors keep their addresses, as buffers do: otherwise its
        CUDA graphs refuse code that writes to them."""
        from torch._dynamo import mark_static_address  # takes seconds to import

        for tensor in (self.load, self.sums, self.shares, self.max_logit):
            mark_static_address(tensor)


def _number_of_tokens(decision: Decision) -> Tensor:
    """() how many tokens are real."""
    if decision.mask is not None:
        return decision.mask.sum()
    return torch.full((), len(decision.x), device=decision.x.device)


def _numbers(all_sums: Tensor, max_logit: float) -> dict[str, float]:
    """What ``RouterHealth.read`` says of a layer; nothing where it got no token."""
    num_experts = (len(all_sums) - len(_Sums._fields) - 1) // 2
    sizes = [len(_Sums._fields), num_experts, 1, num_experts]
    sums, load_E, _, shares_E = all_sums.split(sizes)
    tokens, with_expert, choices, gates, logits, probabilities, entropy_sum = sums.tolist()
    if not tokens:
        return {}

    kept = float(load_E.sum())
    numbers = {
        "load_imbalance": imbalance(load_E),
        "dead_experts": float((load_E == 0).sum()),
        "load_entropy": float(entropy(load_E / max(kept, 1))),
        "drop_share": 1 - kept / choices if choices else 0.0,
        "unrouted_share": 1 - with_expert / tokens,
        "gate_mass": gates / tokens,
    }
    if logits > probabilities:
        numbers["router_entropy"] = float(entropy(shares_E / logits))
        numbers["token_entropy"] = entropy_sum / logits
        numbers["max_logit"] = max_logit
    return numbers
