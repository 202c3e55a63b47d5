"""With ``max_tokens_per_rank`` no shape depends on values and the host never looks at one. Fake
tensors show it without a GPU: they have no values to look at."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from ironmoe.moe import MoE
from ironmoe.moe.exchange import bounded
from ironmoe.moe.exchange.agreement import Place, header_of, told
from ironmoe.moe.exchange.bounded import Overflow
from ironmoe.moe.exchange.errors import Member
from ironmoe.moe.exchange.expert_parallel import ExpertParallel
from ironmoe.moe.exchange.group import Group

RANKS = 4


@pytest.fixture
def group():
    """Four ranks, of which three only seem to be there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    group = object.__new__(Group)  # to make one is an exchange of objects
    group.process_group, group.rank, group.size = dist.group.WORLD, 0, RANKS
    group.members = [Member(rank, "nowhere", 1) for rank in range(RANKS)]
    yield group
    dist.destroy_process_group()


def passed(group, **options):
    """The input gradient of a layer on one of the ranks."""
    with FakeTensorMode():
        layer = MoE(8, 16, 2 * RANKS, 2, shared_dim=8).eval()
        for module in (layer.fc1, layer.fc2):
            for name, weight in list(module.named_parameters()):
                setattr(module, name, torch.nn.Parameter(weight[:2].clone()))  # its own experts
        layer.expert_parallel = ExpertParallel(group, 2 * RANKS, **options)
        x = torch.empty(3, 5, 8, requires_grad=True)
        layer(x).sum().backward()
        return x.grad


def test_bounded_buffers_need_no_look_at_values(group):
    assert passed(group, max_tokens_per_rank=16).shape == (3, 5, 8)


def test_fake_tensors_leave_nothing_behind(group):
    """A layer without fake tensors has the same header in the same process."""
    passed(group, max_tokens_per_rank=16)
    header = header_of(torch.zeros(3, 8), place=Place(), bounded=16, weights_need_grad=False)
    headers, _ = told(group, header, torch.zeros(RANKS, 2, dtype=torch.int64))
    assert type(headers) is torch.Tensor
    assert passed(group, max_tokens_per_rank=16).shape == (3, 5, 8)


def test_without_a_bound_the_host_reads_how_many_rows_come(group):
    with pytest.raises(DataDependentOutputException):
        passed(group)


def said_by(overflow, dropped):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        overflow.add(torch.tensor(dropped), layer=1, places=5)
    return [str(warning.message) for warning in said]


def test_an_overflow_that_nobody_may_look_at_is_said_with_a_later_pass(monkeypatch):
    """A tensor on CPU is here what one on a GPU is elsewhere."""
    monkeypatch.setattr(bounded, "may_look", lambda tensor: False)
    overflow = Overflow()
    assert said_by(overflow, 3) == []
    (text,) = said_by(overflow, 0)
    assert "3 choices were dropped in layer 1" in text and "max_tokens_per_rank = 5" in text
    assert said_by(overflow, 2) == []
    assert "2 choices" in said_by(overflow, 0)[0]
    assert overflow.take() == 5 and overflow.take() == 0
    assert said_by(overflow, 4) == [] and "4 choices" in said_by(overflow, 0)[0]


def test_an_overflow_on_cpu_is_said_at_once():
    overflow = Overflow()
    assert "3 choices" in said_by(overflow, 3)[0] and said_by(overflow, 0) == []
    assert "1 choices" in said_by(overflow, 1)[0]
    assert overflow.take() == 4 and "2 choices" in said_by(overflow, 2)[0]


@pytest.mark.parametrize("may_look", [True, False])
def test_an_overflow_in_inference_mode_is_counted_with_the_others(monkeypatch, may_look):
    monkeypatch.setattr(bounded, "may_look", lambda tensor: may_look)
    overflow = Overflow()
    with torch.inference_mode():
        said_by(overflow, 3)
    said_by(overflow, 2)
    with torch.inference_mode():
        said_by(overflow, 1)
        assert overflow.take() == 6
    said_by(overflow, 4)
    assert overflow.take() == 4
