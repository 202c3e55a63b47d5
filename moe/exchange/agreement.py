"""What the ranks tell each other before rows travel: how many rows each expert will get, and what
must be the same on all of them. A rank that differs would leave the others waiting for ever.

Shape suffixes: P ranks of a group, L experts of a rank, H entries of a header.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ironmoe.moe.exchange.errors import RanksDisagreeError
from ironmoe.moe.exchange.group import Group

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Place(NamedTuple):
    """Which layer comes to an exchange: the number of its model among those that were shared out
    over the group, and its own in this model."""

    model: int = 0
    layer: int = 0


class Header(NamedTuple):
    """What ranks of one exchange must agree on. All are whole numbers.

    model, layer: see ``Place``
    bounded: how many rows a rank sends at most to another one; 0 without a bound
    dtype: of the rows, as the place in ``DTYPES``
    width: D of the rows
    tokens_need_grad, weights_need_grad: whether the backward pass may come back through the rows
    """

    model: int
    layer: int
    bounded: int
    dtype: int
    width: int
    tokens_need_grad: int
    weights_need_grad: int

    def words(self, name: str) -> str:
        """A field for people."""
        value = getattr(self, name)
        if name == "dtype":
            return f"rows of {DTYPES[value]}" if 0 <= value < len(DTYPES) else f"dtype {value}"
        texts = {
            "model": f"model {value} of those that were parallelized",
            "layer": f"layer {value}",
            "bounded": f"max_tokens_per_rank = {value or None}",
            "width": f"rows of width {value}",
            "tokens_need_grad": f"tokens with requires_grad={bool(value)}",
            "weights_need_grad": f"weights with requires_grad={bool(value)}",
        }
        return texts[name]


def header_of(
    rows: Tensor, *, place: Place, bounded: int | None, weights_need_grad: bool
) -> Header:
    """The header of this rank for rows (R, D).

    Raises:
        ValueError: rows of this dtype cannot travel.
    """
    if rows.dtype not in DTYPES:
        raise ValueError(
            f"dispatch_dtype must be one of {', '.join(map(str, DTYPES))} where experts are on "
            f"several ranks, got {rows.dtype}"
        )
    records = torch.is_grad_enabled()
    return Header(
        *place,
        bounded=bounded or 0,
        dtype=DTYPES.index(rows.dtype),
        width=rows.shape[1],
        tokens_need_grad=int(records and rows.requires_grad),
        weights_need_grad=int(records and weights_need_grad),
    )


@lru_cache(maxsize=256)
def _kept(header: Header, device: torch.device) -> Tensor:
    """(1, H) int64. It is kept, because a CUDA graph cannot copy numbers from the host."""
    return torch.tensor([header], dtype=torch.int64, device=device)


def _beside(header: Header, counts: Tensor) -> Tensor:
    if isinstance(counts, FakeTensor):  # which goes with fake tensors of its own mode alone
        return torch.tensor([header], dtype=torch.int64, device=counts.device)
    return _kept(header, counts.device)


def told(group: Group, header: Header, counts_PL: Tensor) -> tuple[Tensor, Tensor]:
    """Tell each rank the header and how many rows its experts will get from here.

    Args:
        counts_PL: (P, L) int64.

    Returns:
        (headers (P, H), counts (P, L)) of the other ranks, int64, for the experts of this one.
    """
    own_PH = _beside(header, counts_PL).expand(group.size, -1)
    message_PX = torch.cat([own_PH, counts_PL], dim=1)
    received_PX = torch.empty_like(message_PX)
    one_each = [1] * group.size
    work = group.start_rows(received_PX, message_PX, one_each, one_each, "counts")
    group.finish_rows(work)
    return received_PX[:, : len(header)], received_PX[:, len(header) :]


def check_agreement(group: Group, own: Header, others: list[list[int]]) -> None:
    """Compare the headers of all ranks with that of this one.

    Raises:
        RanksDisagreeError: they differ. Each rank of the group raises it, so none waits.
    """
    for rank, values in enumerate(others):
        other = Header(*values)
        different = [name for name in Header._fields if getattr(other, name) != getattr(own, name)]
        if different:
            here, there = own.words(different[0]), other.words(different[0])
            raise RanksDisagreeError(
                f"ranks must come to an exchange of tokens with the same settings, got {here} on "
                f"rank {group.global_rank(group.rank)} and {there} on rank "
                f"{group.global_rank(rank)}"
            )
