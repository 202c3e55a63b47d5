"""Passes of a model whose weights are shared out over ranks, where all ranks of one copy of the
weights give it the same images: each works on a part of them, and all get the whole answer.

Shape suffixes: B images of a pass, P ranks, R images of a rank.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from ironmoe.kernels.checks import check_module
from ironmoe.kernels.route import forward_mode, transformed
from ironmoe.moe.exchange.errors import RanksDisagreeError, naming_missing_at
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.exchange.in_step import (
    WHAT,
    all_rows,
    fingerprint,
    of_first,
    own_rows,
    same_gradient,
)
from ironmoe.moe.exchange.same_draws import Draws
from ironmoe.moe.parallel.layers import expert_parallels
from ironmoe.moe.parallel.one_copy import are_on_several_ranks, group_of_one_copy
from ironmoe.moe.routers.groups import images_in_group
from ironmoe.moe.routing.callbacks import has_callbacks

_BLOCKS: list[Group] = []  # those that this process is in
_IN_STEP: set[nn.Module] = set()
_UNDER_WAY: list["_Lane"] = []  # the one whose model runs


@contextmanager
def in_step(*models: nn.Module) -> Iterator[None]:
    """Inside the block all ranks that share one copy of the weights call these models with the same
    images, and do the same with the answers. They are the ranks of an expert-parallel group, and
    with FSDP2 those of its shards.

    Every rank gets the same answers, bit for bit, and the same gradients of the images: those of
    the plain model on one device. Of each batch a rank computes its own part. Where images
    influence each other by a capacity, whole groups stay together. Where that leaves no parts, or a
    trace, an intervention or another hook came to a layer inside the block, or a module is in
    training mode or takes statistics of the batch, each rank computes all images, and of the
    experts its own. Of another influence between images nothing is known here; the checks of
    ``ironmoe.attacks.evaluate`` find it.

    A model is any module that is called with tensors (B, …), by position or by keyword. Those of
    its inputs and outputs whose first dimension is that of the batch are whole on every rank, also
    inside tuples, dicts and what else torch's pytrees know, such as outputs of transformers; other
    outputs are those of this rank's part. Of an output only its first dimension is known: a vector
    that has by accident as many numbers as the part has images is taken for one of the batch, as
    ``torch.nn.DataParallel`` does, and so is an input. Gradients of weights, and of inputs that are
    not of the batch, are not summed over ranks.
    ``max_tokens_per_rank`` does not count here: every row travels. All ranks must be of one kind of
    device. Random models draw other numbers than on one device, and other ones for each part.

    Where the model is not shared out, the block changes nothing. A module with a method
    ``called_modules`` is not called itself, but what this returns.

    Raises:
        TypeError: a model is no module.
        RanksDisagreeError: inside the block, where ranks come with other images or another mode.
        ExchangeError: inside the block, where a rank is missing.
        NotImplementedError: inside the block, under torch.func or forward-mode differentiation.
    """
    for model in models:
        check_module(model)
    group = group_in_step(*models)
    if group is None:
        yield
        return
    with (
        naming_missing_at(group.members, "an exchange between ranks in step"),
        ExitStack() as stack,
    ):
        _BLOCKS.append(group)
        stack.callback(_BLOCKS.pop)
        for module in _called(models):
            if module not in _IN_STEP:
                stack.enter_context(_Lane(module, group).hooked())
        yield


def group_in_step(*models: Any) -> Group | None:
    """The ranks that must call these models together: those of the block of ``in_step`` around,
    else those that share the weights; None where this process needs no other one."""
    if _BLOCKS:
        return _BLOCKS[-1]
    return group_of_one_copy(model for model in models if isinstance(model, nn.Module))


def check_in_step(model: Any) -> None:
    """ValueError: other ranks have a part of the weights and may not take part in the passes."""
    if _BLOCKS or not isinstance(model, nn.Module):
        return
    if are_on_several_ranks([model]):
        raise ValueError(
            "model must be called by all ranks that share its weights, with the same images: put "
            "the call into a block 'with in_step(model):' (ironmoe.moe.distributed) on each of "
            f"them, got a {type(model).__name__} outside such a block"
        )


def _called(models: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    """The modules that are called, each once."""
    for model in dict.fromkeys(models):
        parts: Callable[[], Any] | None = getattr(model, "called_modules", None)
        yield from [model] if parts is None else parts()


class _Pass(NamedTuple):
    """One call of a model. whole: each rank computes all B images."""

    total: int
    rows: int
    whole: bool
    draws: Draws


class _Lane:
    """This rank's part in the passes of one module."""

    def __init__(self, module: nn.Module, group: Group) -> None:
        self.module = module
        self.group = group
        self.experts = expert_parallels(module)
        self.modules = list(module.modules())
        self.unit = images_in_group(module)
        self.number = len(_IN_STEP)  # of those in step in this process
        self.hooks = self._hooks()
        self.is_open = False
        self.now: _Pass | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside the block calls of the module are passes of all ranks."""
        before = [
            (expert.tokens_are_replicated, expert.every_row_travels) for expert in self.experts
        ]
        handles = [
            self.module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            self.module.register_forward_hook(self._leave, always_call=True),
        ]
        self.hooks = self._hooks()
        _IN_STEP.add(self.module)
        self.is_open = True
        try:
            for expert in self.experts:
                expert.every_row_travels = True
            yield
        finally:
            self._end()  # of a pass that Ctrl-C interrupted
            self.is_open = False
            _IN_STEP.discard(self.module)
            for handle in handles:
                handle.remove()
            for expert, (is_replicated, every_row) in zip(self.experts, before, strict=True):
                expert.tokens_are_replicated, expert.every_row_travels = is_replicated, every_row

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not self.is_open or _UNDER_WAY or not tensors or not tensors[0].ndim:
            return None
        if transformed() or forward_mode():
            raise NotImplementedError(
                "models in step have no rule for torch.func and forward mode: use "
                "torch.autograd.grad, or a model whose weights are on one device"
            )

        total = len(tensors[0])
        batch = [tensor for tensor in tensors if tensor.ndim and len(tensor) == total]
        whole = self._needs_all_rows(total)
        draws = Draws(tensors[0].device)
        seed = self._agreed(batch, whole, draws.seed)
        unit = self.unit or 1
        rows = math.ceil(total / unit / self.group.size) * unit
        self.now = _Pass(total, total if whole else rows, whole, draws)
        _UNDER_WAY.append(self)
        draws.begin(seed + (0 if whole else self.group.rank))
        self._replicate(whole)

        here = {id(tensor) for tensor in batch}
        return tree_map(lambda leaf: self._part(leaf) if id(leaf) in here else leaf, (args, kwargs))

    def _leave(self, _: nn.Module, __: object, output: Any) -> Any:
        now = self.now
        self._end()
        if now is None or output is None:  # of a call inside another one, or one that failed
            return None

        def joined(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if now.whole:
                return of_first(leaf, self.group)
            is_part = leaf.ndim and len(leaf) == now.rows
            return all_rows(leaf, self.group, now.total) if is_part else leaf

        outputs = tree_map(joined, output)
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.grad_fn.register_prehook(partial(self._backward_of, now.whole))
        return outputs

    def _replicate(self, whole: bool) -> None:
        """Let the layers run as in a pass of this kind."""
        for expert in self.experts:
            expert.tokens_are_replicated = whole

    def _backward_of(self, whole: bool, _: object) -> None:
        """Activation checkpointing repeats layers in the backward pass of a pass, when there may
        have been others, and the block may have ended."""
        for expert in self.experts:
            expert.repeated = torch._C._current_graph_task_id(), whole

    def _end(self) -> None:
        if self.now is not None:
            self.now.draws.end()
            self.now = None
            _UNDER_WAY.remove(self)

    def _part(self, x: Tensor) -> Tensor:
        """(R, …), this rank's rows of x (B, …). All ranks have as many, and none has 0 rows, which
        not every model takes: beyond the batch there are copies of its first images, whose answers
        nobody reads."""
        assert self.now is not None
        if self.now.whole:
            return same_gradient(x, self.group)
        rows = self.now.rows
        real = min(max(self.now.total - self.group.rank * rows, 0), rows)
        own = own_rows(x, self.group, rows)
        return own if real == rows else torch.cat([own[:real], x.detach()[: rows - real]])

    def _needs_all_rows(self, total: int) -> bool:
        """Whether images influence each other beyond the parts, or somebody looks into the model,
        who expects all of them."""
        if self.unit is None or total % self.unit:
            return True
        return bool(self._hooks() - self.hooks) or any(
            module.training
            or has_callbacks(module)
            or vars(module).get("aux_loss_in_eval", False)
            or (isinstance(module, _BatchNorm) and module.running_mean is None)
            for module in self.modules
        )

    def _hooks(self) -> set[int]:
        """The numbers of all hooks, no two of which are equal."""
        names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return {
            number for module in self.modules for name in names for number in vars(module)[name]
        }

    def __deepcopy__(self, _: Any) -> "_Lane":
        """A copy of the model that somebody makes inside the block has its hooks, which do nothing:
        it is not in step."""
        return _Lane(self.module, self.group)

    def _agreed(self, batch: list[Tensor], whole: bool, seed: int) -> int:
        """The seed of the first rank, after the ranks have compared what they came with.

        Raises:
            RanksDisagreeError: that is not the same.
        """
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in batch)
        images = torch.stack([fingerprint(x) for x in batch]).sum()
        model = self.experts[0].place.model if self.experts else 0
        known = [seed, self.number, model, len(batch[0]), needs_grad, whole]
        told = torch.tensor(known, device=batch[0].device)
        each = self.group.gather(torch.cat([told, images[None]])[None], WHAT).tolist()
        own = each[self.group.rank]
        for rank, other in enumerate(each):
            differs = next((i for i in range(1, len(own)) if other[i] != own[i]), None)
            if differs is not None:
                raise RanksDisagreeError(
                    "ranks in step must call the same model with the same images in the same order "
                    f"and in the same mode, got {_words(own, differs)} on rank "
                    f"{self.group.global_rank(self.group.rank)} and {_words(other, differs)} on "
                    f"rank {self.group.global_rank(rank)}"
                )
        return int(each[0][0])


def _words(known: list[int], place: int) -> str:
    return {
        1: f"model {known[1]} of those in step",
        2: f"model {known[2]} of those that were parallelized",
        3: f"{known[3]} images",
        4: f"images with requires_grad={bool(known[4])}",
        5: "hooks on layers" if known[5] else "no hooks on layers",
        6: f"images with the checksum {known[6]}",
    }[place]
