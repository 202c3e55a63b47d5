"""Hugging Face models on ironmoe's experts, in one line: ``patch(model)``.

transformers (5.17 or newer) sends the forward pass of a model's Experts modules through its experts
interface. ``register`` adds the implementation "ironmoe" to it, ``patch`` selects it for one model.
Routers, shared experts, auxiliary losses, checkpoints, LoRA and ``generate`` stay as they are.
"""

import inspect
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ironmoe.kernels import Routing, expert_mlp
from ironmoe.kernels.route import holds_its_numbers
from ironmoe.moe.adapters.huggingface_activation import decide, warn_once
from ironmoe.moe.adapters.huggingface_loading import follow_recipes
from ironmoe.moe.adapters.huggingface_routing import is_experts
from ironmoe.moe.adapters.token_mask import current_token_mask, keep_token_masks
from ironmoe.moe.exchange.eager import outside_graphs
from ironmoe.moe.exchange.expert_parallel import ExpertParallel

NAME = "ironmoe"
"""The name of this implementation in transformers, for ``experts_implementation``."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Model = TypeVar("_Model", bound=nn.Module)
_Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # w_in, w_out, b_in, b_out


def register() -> None:
    """Make ``experts_implementation="ironmoe"`` known to transformers, for ``from_pretrained`` and
    ``set_experts_implementation``; and let ``from_pretrained`` load upcycled models.

    Only float16, bfloat16, float32 and float64 experts run through this interface; transformers
    keeps another for FP8.

    Raises:
        ImportError: transformers is missing, or too old to have the interface.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "this needs transformers 5.17 or newer: pip install 'transformers>=5.17'"
        ) from error
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            f"transformers {transformers.__version__} has no experts interface; 5.17 or newer is "
            "needed: pip install -U transformers"
        ) from error
    # marks them: a trace asks for their answer and does not look inside
    torch.compiler.assume_constant_result(decide)
    torch.compiler.assume_constant_result(warn_once)
    ExpertsInterface.register(NAME, experts_forward)
    follow_recipes()


class Choice:
    """How an Experts module runs: by the kernels with this activation; None: by its own forward.

    A module that comes out of a pickle brings its choice along, which makes ironmoe's
    implementation known to transformers there.
    """

    def __init__(self, activation: str | None) -> None:
        self.activation = activation

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register()


def patch(model: _Model) -> _Model:
    """Let all experts of a Hugging Face model run on ironmoe's kernels; ``unpatch`` brings back
    what was selected before.

    The choice lives in the model's configs, as that of ``set_experts_implementation`` does; it is
    not saved with a checkpoint, but with a model that is pickled whole. Experts keep the model's
    own eager forward, and one warning a family says so, where ironmoe does not have their
    activation or cannot read their weights, as those that torchao quantises, before or after.
    Activations are told once, here, by trying them: patch again after changing one.

    Tokens that are 0 in a two-dimensional ``attention_mask`` of the model go through no expert, and
    the experts give 0 for them. Real tokens do not depend on them. Inside activation checkpointing
    padding is computed like other tokens.

    Args:
        model: a transformers model, or a module with such models inside.

    Returns:
        ``model`` itself. Patching twice is patching once.

    Raises:
        ImportError: transformers is missing, or too old.
        TypeError: ``model`` is no module.
        ValueError: the model has no Experts modules of transformers' interface, or experts of
            another dtype than float16, bfloat16, float32 and float64.
    """
    experts = _supported_experts(model)
    register()
    before = {id(config): selected for config, selected in getattr(model, "_ironmoe_before", [])}
    configs = _configs_above(model, [name for name, _ in experts])
    for config in configs:
        if config._experts_implementation != NAME:
            before[id(config)] = config._experts_implementation
    former = [(config, before.get(id(config), NAME)) for config in configs]
    _remove_hooks(model)
    model._ironmoe_before = former  # type: ignore[assignment]
    model._ironmoe_hooks = keep_token_masks(model)  # type: ignore[assignment]
    for config in configs:
        # the public setter would reach into sub-configs
        config._experts_implementation_internal = NAME
    for _, module in experts:
        module._ironmoe = choice = Choice(decide(module))  # type: ignore[assignment]
        # A DTensor (FSDP2) may be whole in the forward; quantised ones are warned of now.
        if choice.activation is not None and not any(map(_is_shared_out, module.parameters())):
            _weights(module)
    return model


def unpatch(model: _Model) -> _Model:
    """Select again, config by config, what was selected before ``patch``. Returns ``model``.
    ValueError if it is not patched, or if its experts are shared out over ranks since then."""
    if "_ironmoe_before" not in vars(model):
        raise ValueError(f"model must have been patched, got a {type(model).__name__} that was not")
    if any("expert_parallel" in vars(module) for module in model.modules() if is_experts(module)):
        raise ValueError(
            f"model must have whole experts to run transformers' own forward, got a "
            f"{type(model).__name__} whose experts are shared out over ranks"
        )
    for config, selected in vars(model).pop("_ironmoe_before"):
        config._experts_implementation_internal = selected
    _remove_hooks(model)
    for module in model.modules():
        vars(module).pop("_ironmoe", None)
    return model


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls as the forward of an Experts module: hidden_states (T, D),
    top_k_index and top_k_weights (T, K).

    An index of num_experts or more is another process's expert under transformers' expert
    parallelism: that choice is dropped, and so are the choices of padding. Weights are read once,
    as attributes, so that parametrizations (LoRA) work. Where ``parallelize`` has shared the
    experts out, rows travel to them. Returns (T, D) in the dtype of ``hidden_states``.
    """
    if not hasattr(self, "_ironmoe"):
        self._ironmoe = Choice(decide(self))
    parallel: ExpertParallel | None = getattr(self, "expert_parallel", None)
    if parallel is not None:
        routing = _routing(self, top_k_index, top_k_weights, parallel.num_experts)
        return _through_ranks(self, parallel, hidden_states, routing)
    weights = None if self._ironmoe.activation is None else _weights(self)
    if weights is None:
        return inspect.unwrap(type(self).forward)(self, hidden_states, top_k_index, top_k_weights)
    routing = _routing(self, top_k_index, top_k_weights, weights[0].shape[0])
    y_TD = _product(self, weights, hidden_states, routing)
    # autocast computes in its own dtype; the model's experts return that of their input
    return y_TD.to(hidden_states.dtype)


@outside_graphs
def _through_ranks(
    experts: Any, parallel: ExpertParallel, x_TD: Tensor, routing: Routing
) -> Tensor:
    """The same where the experts are on several ranks."""
    weights = _weights(experts)
    if weights is None:
        raise TypeError(
            f"experts that are shared out over ranks must have float weights, got a "
            f"{type(experts).__name__} whose weights kernels cannot read"
        )
    product = partial(_product, experts, weights)
    y_TD = parallel(
        x_TD,
        routing,
        None,
        experts=product,
        layer=product,
        weights_need_grad=any(w is not None and w.requires_grad for w in weights),
    )
    return y_TD.to(x_TD.dtype)


def _routing(experts: Any, top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> Routing:
    """The choices (T, K) as the kernels take them. Those of padding are dropped.

    Under transformers' own expert parallelism rows may be those of other ranks, so nobody knows
    which are padding.
    """
    experts_TK = top_k_index.clamp(max=num_experts).to(torch.int32)
    has_other_rows = getattr(experts, "_is_expert_parallel", False)
    real_T = None if has_other_rows else current_token_mask(experts_TK.shape[0])
    if real_T is not None:
        padding_T1 = ~real_T.to(experts_TK.device)[:, None]
        experts_TK = experts_TK.masked_fill(padding_T1, num_experts)
    return Routing(top_k_weights, experts_TK)


def _product(experts: Any, weights: _Weights, x_TD: Tensor, routing: Routing) -> Tensor:
    """y (T, D) by the experts of this process."""
    w_in, w_out, b_in, b_out = weights
    if experts.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    activation = experts._ironmoe.activation
    return expert_mlp(x_TD, w_in, w_out, routing, b_in=b_in, b_out=b_out, activation=activation)


def _weights(experts: Any) -> _Weights | None:
    """w_in, w_out, b_in, b_out as the module has them now, of the experts of this rank; None and a
    warning if the kernels cannot read one. It is asked at each forward, because weights may be
    quantised after ``patch``."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    w_in, w_out = getattr(experts, first), experts.down_proj
    b_in = getattr(experts, f"{first}_bias") if experts.has_bias else None
    b_out = experts.down_proj_bias if experts.has_bias else None
    parallel: ExpertParallel | None = getattr(experts, "expert_parallel", None)
    if parallel is not None:
        w_in, w_out, b_in, b_out = map(parallel.local, (w_in, w_out, b_in, b_out))
    for weight in (w_in, w_out, b_in, b_out):
        if weight is not None and not (weight.dtype in _FLOATS and holds_its_numbers(weight)):
            warn_once(experts, f"a weight is a {type(weight).__name__} that kernels cannot read")
            return None
    return w_in, w_out, b_in, b_out


def _is_shared_out(weight: Tensor) -> bool:
    """Whether it is a DTensor, told without the import of torch.distributed."""
    return hasattr(weight, "device_mesh")


def _remove_hooks(model: nn.Module) -> None:
    for handle in vars(model).pop("_ironmoe_hooks", []):
        handle.remove()


def _supported_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The Experts modules and their names. The errors of ``patch``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    supported = (
        "supported are the float Experts modules of transformers' experts interface "
        "(@use_experts_implementation)"
    )
    experts = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    if not experts:
        kinds = {type(module).__name__ for module in model.modules()}
        found = sorted(kind for kind in kinds if "expert" in kind.lower() or "moe" in kind.lower())
        raise ValueError(
            f"{type(model).__name__} has no experts to patch; found "
            f"{', '.join(found) or 'no module named after experts'}; {supported}"
        )
    for name, module in experts:
        dtype = (module.gate_up_proj if module.has_gate else module.up_proj).dtype
        if dtype not in _FLOATS:
            raise ValueError(
                f"{type(model).__name__} has quantised experts: {name} is a "
                f"{type(module).__name__} of {dtype}; {supported}"
            )
    return experts


def _configs_above(model: nn.Module, expert_names: list[str]) -> list[Any]:
    """Each config of an Experts module or of a model around one, once. ``generate`` switches a
    model's experts by the configs around them, so these must say the same."""
    configs = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        above = any(f"{expert}.".startswith(f"{name}." if name else "") for expert in expert_names)
        if above and hasattr(config, "_experts_implementation_internal"):
            configs[id(config)] = config
    return list(configs.values())
