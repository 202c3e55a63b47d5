"""Which tokens of a running Hugging Face model are padding, told by the attention mask of the model
around the experts.

An Experts module sees tokens (T, D) and no mask. ``keep_token_masks`` puts hooks on each model
around one; inside its forward pass ``current_token_mask`` says which of the T tokens are real.
"""

import inspect
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ironmoe.moe.adapters.huggingface_routing import is_experts

# Arguments of a transformers model; the last one was renamed in a release after 5.17.
_TOKENS = ("input_ids", "inputs_embeds")
_CACHES = ("past_key_values", "cache")


class _Entry(NamedTuple):
    """A forward pass that has begun: whose it is, the mask (B, S) or None, and how autograd stood
    there."""

    owner: "_MaskKeeper"
    mask_BS: Tensor | None
    autograd: tuple[Any, ...]


class _Entries:
    """The forward passes around the running code, the innermost last."""

    def __init__(self) -> None:
        self.entries: tuple[_Entry, ...] = ()


class _EntriesOfThread(threading.local, _Entries):
    pass


# Dynamo cannot see a write to a threading.local, and compiles for one thread at a time.
_EAGER, _COMPILING = _EntriesOfThread(), _Entries()


def current_token_mask(num_tokens: int, *, checkpointed: bool = False) -> Tensor | None:
    """(T,) bool, True at real tokens, on the device of the attention mask; or None where no mask is
    known for T = ``num_tokens`` tokens.

    None also inside activation checkpointing, because the recomputation in the backward pass runs
    outside the model, where no mask is known, and must compute the same. ``checkpointed=True``: the
    mask there, too, for those who look and compute nothing.
    """
    entries = _here().entries
    if not entries or entries[-1].mask_BS is None:
        return None
    if not checkpointed and entries[-1].autograd != _autograd():
        return None
    mask_T = entries[-1].mask_BS.flatten()
    return mask_T if mask_T.shape[0] == num_tokens else None


def keep_token_masks(model: nn.Module) -> list[RemovableHandle]:
    """Put hooks on every transformers model around an Experts module, so that
    ``current_token_mask`` knows its attention mask. Whoever removes the handles takes them off."""
    handles = []
    experts = [name for name, module in model.named_modules() if is_experts(module)]
    for name, module in model.named_modules():
        around = any(expert.startswith(f"{name}." if name else "") for expert in experts)
        # A tower of images has no mask, and must hide that of the text around it.
        if around and hasattr(module, "get_input_embeddings"):
            keeper = _MaskKeeper(tuple(inspect.signature(module.forward).parameters))
            handles += [
                module.register_forward_pre_hook(keeper.enter, with_kwargs=True),
                # also after an exception
                module.register_forward_hook(keeper.leave, always_call=True),
            ]
    return handles


class _MaskKeeper:
    """The hooks of one model. ``names`` are the parameters of its forward."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        store = _here()
        outer = self._outside(store.entries)
        mask_BS = _mask_of(given, outer[-1].mask_BS if outer else None)
        store.entries = (*outer, _Entry(self, mask_BS, _autograd()))

    def leave(self, _: nn.Module, __: object, ___: object) -> None:
        store = _here()
        store.entries = self._outside(store.entries)

    def _outside(self, entries: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
        """The entries before this model's own. An interrupt (Ctrl-C) runs no hook, so there may be
        an entry of an earlier call."""
        for index, entry in enumerate(entries):
            if entry.owner is self:
                return entries[:index]
        return entries


def _mask_of(given: dict[str, Any], outer_BS: Tensor | None) -> Tensor | None:
    """(B, S) bool of the S tokens of this call, out of the arguments of a model's forward.

    With a KV cache the mask has columns for the earlier tokens, too; those of this call are the
    last. A mask in another form, such as (B, 1, S, S), was made from a mask that the model around
    this one got.
    """
    mask = given.get("attention_mask")
    tokens = next((given[name] for name in _TOKENS if given.get(name) is not None), None)
    if mask is None or not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return outer_BS
    earlier = mask.shape[1] - tokens.shape[1]
    # A cache of fixed length takes masks of that length, whose last columns are of later tokens.
    cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    grows = not getattr(cache, "is_compileable", True)
    if mask.shape[0] != tokens.shape[0] or earlier < 0 or (earlier > 0 and not grows):
        return None
    return mask[:, earlier:] != 0


def _here() -> _Entries:
    return _COMPILING if torch.compiler.is_compiling() else _EAGER


def _autograd() -> tuple[Any, ...]:
    """What activation checkpointing changes around the code that it will run again: the grad mode
    (reentrant) or the hooks on saved tensors; and the backward pass that runs it again."""
    if torch.compiler.is_compiling():  # one graph, whose partitioner recomputes
        return ()
    return (
        torch.is_grad_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch._C._current_graph_task_id(),
    )
