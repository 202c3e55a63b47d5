"""With ``max_tokens_per_rank`` no shape depends on values and the host never looks at one. Fake
tensors show it without a GPU: they have no values to look at."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from ironmoe.moe import MoE
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


def test_without_a_bound_the_host_reads_how_many_rows_come(group):
    with pytest.raises(DataDependentOutputException):
        passed(group)
