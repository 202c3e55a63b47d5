"""Hugging Face models on ironmoe's experts, in one line: ``patch(model)``.

transformers (5.17 or newer) sends the forward pass of a model's Experts modules through its experts
interface. ``register`` adds the implementation "ironmoe" to it, ``patch`` selects it for one model.
Routers, shared experts, auxiliary losses, checkpoints, LoRA and ``generate`` stay as they are.
"""

import inspect
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ironmoe.kernels import ACTIVATIONS, Routing, expert_mlp
from ironmoe.moe.adapters.huggingface_routing import is_experts

NAME = "ironmoe"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WEIGHTS = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "up_proj",
    "up_proj_bias",
    "down_proj",
    "down_proj_bias",
)
_Model = TypeVar("_Model", bound=nn.Module)


def register() -> None:
    """Make ``experts_implementation="ironmoe"`` known to transformers, for ``from_pretrained`` and
    ``set_experts_implementation``.

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
    # marks it: a trace asks for its answer and does not look inside
    torch.compiler.assume_constant_result(_decide)
    ExpertsInterface.register(NAME, experts_forward)


def patch(model: _Model) -> _Model:
    """Let all experts of a Hugging Face model run on ironmoe's kernels; ``unpatch`` brings back
    what was selected before.

    The choice lives in the model's configs, as that of ``set_experts_implementation`` does; it is
    not saved with a checkpoint. Experts whose activation ironmoe does not have keep the model's own
    eager forward: one warning a family says so. Activations are
    told once, here, by trying them: patch again after changing one.

    Args:
        model: a transformers model, or a module with such models inside.

    Returns:
        ``model`` itself. Patching twice is patching once.

    Raises:
        ImportError: transformers is missing, or too old.
        TypeError: ``model`` is no module.
        ValueError: the model has no Experts modules of transformers' interface, or quantised ones.
    """
    experts = _supported_experts(model)
    register()
    before = {id(config): selected for config, selected in getattr(model, "_ironmoe_before", [])}
    configs = _configs_above(model, [name for name, _ in experts])
    for config in configs:
        if config._experts_implementation != NAME:
            before[id(config)] = config._experts_implementation
    former = [(config, before.get(id(config), NAME)) for config in configs]
    model._ironmoe_before = former  # type: ignore[assignment]
    for config in configs:
        # the public setter would reach into sub-configs
        config._experts_implementation_internal = NAME
    for _, module in experts:
        module._ironmoe_activation = _decide(module)  # type: ignore[assignment]
    return model


def unpatch(model: _Model) -> _Model:
    """Select again, config by config, what was selected before ``patch``. Returns ``model``.
    ValueError if it is not patched."""
    if "_ironmoe_before" not in vars(model):
        raise ValueError(f"model must have been patched, got a {type(model).__name__} that was not")
    for config, selected in vars(model).pop("_ironmoe_before"):
        config._experts_implementation_internal = selected
    for module in model.modules():
        vars(module).pop("_ironmoe_activation", None)
    return model


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls as the forward of an Experts module: hidden_states (T, D),
    top_k_index and top_k_weights (T, K).

    An index of num_experts or more is another process's expert under expert parallelism: that
    choice is dropped. Weights are read once, as attributes, so that parametrizations (LoRA) work.
    Returns (T, D) in the dtype of ``hidden_states``.
    """
    if not hasattr(self, "_ironmoe_activation"):
        self._ironmoe_activation = _decide(self)
    if self._ironmoe_activation is None:
        return inspect.unwrap(type(self).forward)(self, hidden_states, top_k_index, top_k_weights)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    w_in, w_out = getattr(self, first), self.down_proj
    if self.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    y_TD = expert_mlp(
        hidden_states,
        w_in,
        w_out,
        Routing(top_k_weights, top_k_index.clamp(max=w_in.shape[0]).to(torch.int32)),
        b_in=getattr(self, f"{first}_bias") if self.has_bias else None,
        b_out=self.down_proj_bias if self.has_bias else None,
        activation=self._ironmoe_activation,
    )
    # autocast computes in its own dtype; the model's experts return that of their input
    return y_TD.to(hidden_states.dtype)


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


def _decide(experts: nn.Module) -> str | None:
    """The name of the activation that does what the module's own does, or None and a warning. In a
    thread of its own: no autocast, no inference mode, no fake tensors and no transform are at work
    there."""
    with ThreadPoolExecutor(1) as thread:
        name, reason = thread.submit(_same_activation, experts).result()
    if name is None:
        _warn_once(f"{type(experts).__name__} keeps the eager experts of transformers: {reason}")
    return name


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _same_activation(experts: Any) -> tuple[str | None, str]:
    """(name, "") of the activation with the values and slopes of the module's own, tried on
    numbers; or (None, why there is none)."""
    if getattr(experts, "has_post_expert_norm", False):
        return None, "it normalises what each expert gives"
    own = (
        name.removeprefix("parametrizations.")
        for name, _ in chain(experts.named_parameters(), experts.named_buffers())
    )
    unknown = sorted({name for name in own if name.split(".")[0] not in _WEIGHTS})
    if unknown:
        return None, f"it holds {', '.join(unknown)}, which ironmoe does not know"
    own_name = "_apply_gate" if experts.has_gate else "act_fn"
    hidden = _probe().requires_grad_()
    try:
        value = getattr(experts, own_name)(hidden)
        (slope,) = torch.autograd.grad(value.sum(), hidden)
    except Exception as error:
        return None, f"its {own_name} could not be tried ({type(error).__name__}: {error})"
    hidden = hidden.detach()
    for name, activation in ACTIVATIONS.items():
        if activation.gated == experts.has_gate:
            expected = activation.value(hidden)
            if _same(value, expected) and _same(
                slope, activation.backward(torch.ones_like(expected), hidden)
            ):
                return name, ""
    act_fn = getattr(experts, "act_fn", None)
    kind = "" if act_fn is None else f" with {getattr(act_fn, '__name__', type(act_fn).__name__)}"
    return None, f"ironmoe has no activation like its {own_name}{kind}"


def _probe() -> Tensor:
    """(64, 64) pre-activations: the halves from −20 to 20, so that cuts at such numbers are met
    exactly, and numbers up to ±1e6."""
    points = torch.cat(
        [torch.arange(-40, 41) / 2, torch.tensor([-1e6, -1e4, -1e2, 1e2, 1e4, 1e6])]
    ).double()
    return points[torch.randint(len(points), (64, 64), generator=torch.Generator().manual_seed(0))]


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(
        ours.double(), theirs, rtol=1e-5, atol=1e-5
    )
