"""Counting sort of the choices and the cut into tiles: exact, whatever the sizes. All on poisoned
memory."""

import contract
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ironmoe.kernels import plan_dispatch
from ironmoe.kernels.dispatch import plan_tiles
from ironmoe.kernels.gpu import dispatch
from ironmoe.kernels.gpu.launch import observe
from ironmoe.kernels.tuning import max_tiles, rows_per_tile

OPERATORS = torch.ops.ironmoe
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:triton.runtime.interpreter")
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)


def check_plan(experts, num_experts, device):
    """Against a stable sort in Python; whoever is outside 0 … E − 1 comes last, as dropped."""
    with contract.poisoned(), observe() as launches:
        got = dispatch.plan(experts.to(device), num_experts)
    assert len(launches) == (3 if experts.numel() else 0)
    top_k, flat = (
        experts.shape[1],
        [e if 0 <= e < num_experts else num_experts for e in experts.flatten().tolist()],
    )
    order = sorted(range(len(flat)), key=flat.__getitem__)  # Python's sort is stable
    place = {choice: row for row, choice in enumerate(order)}
    offsets, row_token, row_slot, slot_row, tiles = (t.tolist() for t in got)
    assert tiles == [[], []]
    counts = torch.bincount(torch.tensor(flat, dtype=torch.long), minlength=num_experts)[
        :num_experts
    ]
    assert offsets == [0, *counts.cumsum(0).tolist()]
    assert row_token == [choice // top_k for choice in order]
    assert row_slot == [choice % top_k for choice in order]
    assert slot_row == [
        [place[t * top_k + k] if flat[t * top_k + k] < num_experts else -1 for k in range(top_k)]
        for t in range(len(experts))
    ]
    assert all(t.dtype == torch.int32 for t in got)


@st.composite
def choices(draw):
    """(experts (T, K), E): sentinels, and now and then one expert that takes nearly all."""
    num_experts, tokens, top_k = (
        draw(st.integers(1, 70)),
        draw(st.integers(0, 120)),
        draw(st.integers(1, 5)),
    )
    torch.manual_seed(draw(st.integers(0, 999)))
    experts = torch.randint(
        0, num_experts + 1, (tokens, top_k), dtype=draw(st.sampled_from([torch.int32, torch.int64]))
    )
    taken = draw(st.sampled_from([None, 0, num_experts - 1, num_experts]))
    return experts if taken is None else experts.masked_fill(
        torch.rand(tokens, top_k) < 0.95, taken
    ), num_experts


@quick
@given(choices())
def test_plan_is_a_stable_sort(device, case):
    check_plan(*case, device)


@pytest.mark.parametrize("segments", [1, 3, 64])
@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("tokens", [1, 128, 129, 200])
def test_plan_of_any_number_of_segments_and_blocks(device, monkeypatch, tokens, block, segments):
    monkeypatch.setattr(dispatch, "BLOCK", block)
    monkeypatch.setattr(dispatch, "MAX_SEGMENTS", segments)
    check_plan(torch.randint(0, 6, (tokens, 2)), 5, device)


@pytest.mark.parametrize("num_experts", [255, 256, 1023, 1024])
def test_plan_of_many_experts(device, num_experts):
    """Bins are a power of two, and one more than experts are needed."""
    experts = torch.randint(0, num_experts + 1, (500, 1))
    experts[:2, 0] = torch.tensor([num_experts - 1, num_experts])
    check_plan(experts, num_experts, device)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_choices_out_of_range_are_dropped(device, dtype):
    """Also those that would be in range again with 32 bits."""
    wild = torch.tensor([[0, 1, 99], [127, 2, 3]])
    if dtype != torch.uint8:
        wild[1, 2] = -1
    if dtype == torch.int64:
        wild[0, 0], wild[1, 1] = 2**32, -(2**32) + 1
    check_plan(wild.to(dtype), 3, device)


def test_plan_of_strided_choices(device):
    base = torch.randint(0, 5, (6, 8), dtype=torch.int32, device=device)
    for view in (base.t(), base[::2, 1::3], base[:1].expand(6, 8), base[:, :1].expand(6, 3)):
        got, dense = dispatch.plan(view, 4), dispatch.plan(view.contiguous(), 4)
        assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))


def test_public_plan_takes_the_kernels_and_repeats(device):
    experts = torch.randint(0, 9, (50, 3), device=device)
    with observe() as launches:
        first = plan_dispatch(experts, 8)
    assert [seen.kernel.fn.__name__ for seen in launches] == [
        "count_kernel",
        "scan_kernel",
        "place_kernel",
    ]
    assert all(torch.equal(a, b) for a, b in zip(first, plan_dispatch(experts, 8), strict=True))


@quick
@given(choices(), st.sampled_from([torch.float32, torch.float16]))
def test_plan_and_tiles_in_one_are_the_two(device, case, dtype):
    experts, num_experts = case[0].to(device), case[1]
    with contract.poisoned(), observe() as launches:
        *dispatch, tiles = OPERATORS.plan_dispatch(experts, num_experts, dtype)
    assert len(launches) == (3 if experts.numel() else 0)
    separate = plan_dispatch(experts, num_experts)
    assert all(torch.equal(a, b) for a, b in zip(dispatch, separate, strict=True))
    twin = twin_tiles(dispatch[0].cpu(), experts.numel(), dtype)
    used = int((twin[0] >= 0).sum())
    assert tiles[0].tolist() == twin[0].tolist()
    assert tiles[1, :used].tolist() == twin[1, :used].tolist()


@pytest.mark.parametrize("tokens, num_experts", [(1, 200), (700, 3)])
def test_more_experts_than_segments_and_the_other_way_round(device, tokens, num_experts):
    """A program of ``place`` writes the tiles of one expert and places one segment."""
    experts = torch.randint(0, num_experts + 1, (tokens, 2), device=device)
    with contract.poisoned():
        *dispatch, tiles = OPERATORS.plan_dispatch(experts, num_experts, torch.float16)
        want = plan_tiles(dispatch[0], experts.numel(), torch.float16)
    used = int((want[0] >= 0).sum())
    assert torch.equal(tiles[0], want[0]) and torch.equal(tiles[1, :used], want[1, :used])


@st.composite
def splits(draw):
    """(offsets, rows, dtype): rows past the last offset belong to dropped choices."""
    counts = draw(
        st.lists(
            st.sampled_from([0, 0, 1, 15, 16, 17, 31, 32, 33, 64, 200]), min_size=1, max_size=12
        )
    )
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    return (
        offsets,
        int(offsets[-1]) + draw(st.sampled_from([0, 1, 40])),
        draw(st.sampled_from([torch.float32, torch.float16])),
    )


@quick
@given(splits())
def test_tiles_cover_each_row_once_and_hold_one_expert(device, case):
    offsets, num_rows, dtype = case
    num_experts = len(offsets) - 1
    with contract.poisoned():
        tiles = plan_tiles(offsets.to(device), num_rows, dtype).tolist()
    length = rows_per_tile(num_rows, num_experts, dtype)
    bounds = [*offsets.tolist(), num_rows]
    covered = []
    for expert, first in zip(*tiles, strict=True):
        if expert >= 0:
            assert (
                bounds[expert] <= first < bounds[expert + 1]
                and (first - bounds[expert]) % length == 0
            )
            covered += range(first, min(first + length, bounds[expert + 1]))
    assert covered == list(range(num_rows))
    used = [expert for expert in tiles[0] if expert >= 0]
    assert tiles[0] == used + [-1] * (len(tiles[0]) - len(used))
    twin = twin_tiles(offsets, num_rows, dtype)
    assert twin[0].tolist() == tiles[0] and twin[1][: len(used)].tolist() == tiles[1][: len(used)]


def twin_tiles(offsets, num_rows, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        return plan_tiles(offsets, num_rows, dtype)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 16, 17, 40])
def test_number_of_tiles_is_the_largest_any_split_can_need(num_rows):
    def needed(rows, groups):
        """The most tiles of 4 rows that ``rows`` rows in ``groups`` groups can need."""
        if groups == 1:
            return -(-rows // 4)
        return max(-(-own // 4) + needed(rows - own, groups - 1) for own in range(rows + 1))

    for groups in (1, 2, 3):
        assert max_tiles(num_rows, groups, 4) == needed(num_rows, groups)
