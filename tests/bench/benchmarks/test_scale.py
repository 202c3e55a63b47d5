"""The cost model of expert parallelism against hand counts, against what layers really hold and
against what cannot be otherwise."""

import pytest
import scale_tables

from ironmoe.bench.benchmarks.gpus import GPUS
from ironmoe.bench.benchmarks.passes import DX, FULL, INFERENCE
from ironmoe.bench.benchmarks.roofline import limit_ms, needed_flops
from ironmoe.bench.benchmarks.scale.alternatives import communication_seconds, way_ms
from ironmoe.bench.benchmarks.scale.exchange import Sent, bytes_between, handed_bytes, sent_rows
from ironmoe.bench.benchmarks.scale.layers import LAYERS, Layer, World
from ironmoe.bench.benchmarks.scale.links import LINKS, Links, changed, gpu_with_links
from ironmoe.bench.benchmarks.scale.memory import experts_gb
from ironmoe.bench.benchmarks.scale.meshes import ONE_GROUP, best, layouts
from ironmoe.bench.benchmarks.scale.times import Machine, exchange_ms, layer_time, local_shape
from ironmoe.bench.benchmarks.scale.ways import EP, FSDP2, REPLICAS
from ironmoe.bench.benchmarks.shapes import MAIN, SHAPES, Shape
from ironmoe.bench.common.user_error import UserError

H100 = GPUS["h100"]
MACHINE = Machine(H100, H100.peak, LINKS["h100"])
REACHED = MACHINE._replace(rates=H100.reached)
TINY = Layer(Shape("tiny", 4, 8, 16, 2, 2, "gelu", bias=True))  # R = 8 rows of 16 bytes
ROUND = Links(nvlink=1.0, network=0.5, memory=1.0, source="", nvlink_us=2, network_us=5, start_us=1)
PASSES = (INFERENCE, DX, FULL)


def test_what_two_ranks_send_if_every_token_stays_or_leaves():
    """8 rows of 8 numbers in bf16 go there and come back: 2 · 8 · 16 bytes; backward the same."""
    stay, leave = ([8, 0], [8, 0]), ([0, 8], [0, 8])
    for pass_name, trips in ((INFERENCE, 1), (DX, 2), (FULL, 2)):
        assert handed_bytes(*stay, 16, pass_name) == handed_bytes(*leave, 16, pass_name)
        assert handed_bytes(*stay, 16, pass_name) == trips * 256
        assert bytes_between(*stay, 16, pass_name, rank=0) == 0
        assert bytes_between(*leave, 16, pass_name, rank=0) == trips * 256
    uneven = [3, 5], [3, 1]  # rank 0 keeps 3 rows, sends 5, and gets 1
    assert handed_bytes(*uneven, 16, INFERENCE) == (8 + 4) * 16
    assert bytes_between(*uneven, 16, INFERENCE, rank=0) == (5 + 1) * 16


def test_an_even_load_sends_the_share_of_other_ranks_and_of_other_nodes():
    assert sent_rows(TINY, World(1), FULL) == Sent(0, 0, 0)
    assert sent_rows(TINY, World(2, node=2), INFERENCE) == Sent(256, 128, 0)
    assert sent_rows(TINY, World(2, node=1), INFERENCE) == Sent(256, 128, 128)
    assert sent_rows(TINY, World(4, node=2), FULL) == Sent(512, 384, 256)
    even = [4, 4], [4, 4]
    assert bytes_between(*even, 16, DX, rank=1) == sent_rows(TINY, World(2), DX).to_others
    assert World(16, node=8).nodes == 2 and World(12, node=8).nodes == 2


def test_an_input_gradient_and_a_full_backward_pass_exchange_the_same_rows():
    for layer in LAYERS:
        assert sent_rows(layer, World(8), DX) == sent_rows(layer, World(8), FULL)


def test_the_time_of_an_exchange_by_hand():
    """At 1 GB/s a byte takes a nanosecond; the network has half of that."""
    inside, latency = 128e-6, (1 + 2) * 1e-3
    world = World(2, node=2)
    assert exchange_ms(TINY, world, INFERENCE, ROUND) == pytest.approx(inside + 3 * latency)
    assert exchange_ms(TINY, world, FULL, ROUND) == pytest.approx(2 * inside + 5 * latency)

    # of 384 bytes 256 leave the node, which takes longer than the 128 inside
    outside = 256e-6 / 0.5 + 5 * (1 + 5) * 1e-3
    assert exchange_ms(TINY, World(4, node=2), DX, ROUND) == pytest.approx(outside)
    uneven = exchange_ms(TINY, World(2, node=2, imbalance=1.5), INFERENCE, ROUND)
    assert uneven == pytest.approx(1.5 * inside + 3 * latency)


def test_the_width_of_an_expert_alone_decides_how_dear_an_exchange_is():
    """docs/scale.md: bytes · peak / (bandwidth · (W + F)), and the widths at which that is 1."""
    rates, links = H100.reached, LINKS["h100"]
    for shape in (*SHAPES, Shape("gelu", 7, 5, 3, 8, 2, "gelu")):
        sent = sent_rows(Layer(shape), World(2, node=1), INFERENCE)
        exchange = sent.to_others / links.network * 1e-9
        experts = needed_flops(shape, INFERENCE) / rates.tflops * 1e-12
        width = shape.wide + shape.hidden
        assert exchange / experts == pytest.approx(0.5 * 31_600 / width)
    wide = {shape.name for shape in SHAPES if shape.wide + shape.hidden > 31_600}
    assert wide == {"mixtral"}
    assert 2 * rates.tflops * 1e3 / links.nvlink == pytest.approx(3_500, rel=0.01)


def test_the_experts_of_a_rank_get_the_rows_of_all_ranks():
    layer, world = LAYERS[0], World(8)
    local = local_shape(layer, world)
    assert (local.rows, local.num_experts) == (layer.shape.rows, layer.shape.num_experts // 8)
    assert local_shape(layer, World(8, imbalance=2)).rows == 2 * layer.shape.rows
    assert (
        local_shape(layer, World(2, imbalance=9)).rows == 2 * layer.shape.rows
    )  # there are no more
    alone = layer_time(layer, World(1), FULL, MACHINE)
    assert alone == (limit_ms(layer.shape, FULL, H100.peak, H100.chip), 0, 0, 0, 0)


def test_with_few_rows_an_expert_the_reading_of_weights_counts():
    """One token of 8 rows: each rank reads the weights of fewer experts than one alone does."""
    decode = Layer(MAIN._replace(tokens=1))
    times = [layer_time(decode, World(n), INFERENCE, MACHINE).experts for n in (1, 32, 128)]
    assert times[0] == pytest.approx(
        layer_time(decode, World(8), INFERENCE, MACHINE).experts, rel=0.1
    )
    assert times[0] > times[1] > times[2]


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("layer", LAYERS, ids=[layer.shape.name for layer in LAYERS])
def test_more_ranks_more_tokens_and_a_worse_load_never_cost_less(layer, pass_name):
    def total(layer, **world):
        return layer_time(layer, World(**world), pass_name, MACHINE)

    exchanges = [total(layer, ranks=n).exchange for n in (1, 2, 4, 8, 16, 32)]
    assert exchanges == sorted(exchanges) and exchanges[0] == 0
    loads = [total(layer, ranks=16, imbalance=i).total for i in (1, 1.5, 2, 4)]
    assert loads == sorted(loads)
    tokens = [total(layer.with_tokens(n), ranks=8).total for n in (1, 64, 4096, 65536)]
    assert tokens == sorted(tokens)
    faster = MACHINE._replace(links=changed(MACHINE.links, network_gbs=100))
    assert layer_time(layer, World(16), pass_name, faster) < total(layer, ranks=16)


def test_what_fsdp2_and_replicas_send_by_hand():
    """2 experts of 2 · 8 · 16 weights and 24 biases: 560 parameters. Of a ring of two, each rank
    sends a half; without latency, in nanoseconds at 1 GB/s."""
    assert TINY.expert_numbers == 2 * (2 * 8 * 16 + 16 + 8) == 560
    free = ROUND._replace(nvlink_us=0, network_us=0, start_us=0)
    gather, reduce = 560 * 2 / 2 * 1e-9, 560 * 4 / 2 * 1e-9

    def seconds(way, pass_name, ranks=2):
        return communication_seconds(way, TINY, World(ranks, node=2), pass_name, free)

    assert seconds(FSDP2, INFERENCE) == pytest.approx(gather)
    assert seconds(FSDP2, DX) == pytest.approx(2 * gather)
    assert seconds(FSDP2, FULL) == pytest.approx(2 * gather + reduce)
    assert seconds(REPLICAS, DX) == 0 and seconds(REPLICAS, FULL) == pytest.approx(2 * reduce)
    # a node takes every byte of the other once, and two GPUs share it among their cards
    across = 560 * 2 / 2 / 2 / 0.5 * 1e-9
    inside = 560 * 2 * 3 / 4 * 1e-9
    assert seconds(FSDP2, INFERENCE, ranks=4) == pytest.approx(max(across, inside))
    one = World(2, node=1)
    assert communication_seconds(FSDP2, TINY, one, INFERENCE, ROUND) == pytest.approx(
        560 * 2 / 2 / 0.5 * 1e-9 + (1 + 5) * 1e-6
    )


@pytest.mark.parametrize("pass_name", [DX, FULL])
def test_layouts_of_one_kind_are_the_alternatives(pass_name):
    layer = LAYERS[0]
    found = {
        (one.ranks, one.between): one for one in layouts(layer, 16, World(1), pass_name, MACHINE)
    }
    assert {ranks for ranks, _ in found} == {1, 2, 4, 8, 16}
    world = World(16)
    assert found[1, FSDP2].ms == way_ms(FSDP2, layer, world, pass_name, MACHINE)
    # replicas average their gradients after the backward pass, and not beside it
    sums = communication_seconds(REPLICAS, layer, world, pass_name, MACHINE.links) * 1e3
    products = layer_time(layer, World(1), pass_name, MACHINE).total
    assert found[1, REPLICAS].ms == pytest.approx(products + sums)
    assert (sums == 0) == (pass_name == DX)
    assert found[16, ONE_GROUP].ms == way_ms(EP, layer, world, pass_name, MACHINE)
    assert found[16, ONE_GROUP].gigabytes == experts_gb(layer, world, pass_name)


@pytest.mark.parametrize(("node", "waits"), [(16, True), (8, False), (4, True)])
def test_rows_and_weights_wait_for_each_other_where_they_share_a_link(node, waits):
    """Two groups of 8: both in one node; a node for each; and two nodes for each. Links are so slow
    that nothing else counts."""
    layer, slow = LAYERS[0], MACHINE._replace(links=ROUND)
    found = layouts(layer, 16, World(1, node=node), DX, slow)
    (one,) = (one for one in found if (one.ranks, one.between) == (8, FSDP2))
    held, groups = layer.with_experts(4), World(2, node=max(node // 8, 1))
    weights = communication_seconds(FSDP2, held, groups, DX, ROUND) * 1e3
    time = layer_time(layer, World(8, node), DX, slow)
    assert one.ms == (weights + time.exchange if waits else max(weights, time.total))


@pytest.mark.parametrize("layer", LAYERS[:2], ids=["L/16", "H/14"])
def test_gradients_of_four_passes_make_groups_inside_a_node_the_faster_ones(layer):
    """As docs/scale.md has it for 64 GPUs: their average is taken once for all passes."""
    found = layouts(layer, 64, World(1), FULL, REACHED)
    alone = layer_time(layer, World(8), FULL, REACHED).total
    (inside,) = (one.ms for one in found if (one.ranks, one.between) == (8, REPLICAS))
    assert inside > best(found, 80).ms > alone + (inside - alone) / 4


def test_the_best_layout_fits_and_none_that_fits_is_faster():
    found = layouts(LAYERS[1], 64, World(1), FULL, MACHINE)
    chosen = best(found, 80)
    assert chosen.gigabytes <= 80
    assert all(one.ms >= chosen.ms or one.gigabytes > 80 for one in found)
    assert best(found, 1e-3) is None


def test_links_have_a_source_and_can_be_replaced():
    for name, links in LINKS.items():
        assert name in GPUS and "data sheet" in links.source
        assert links.nvlink > links.network > 0 and links.memory > 0
    gpu, links = gpu_with_links(" H100")
    assert gpu is H100 and links is LINKS["h100"] and changed(links) is links
    own = changed(links, nvlink_gbs=300, memory_gb=94)
    assert (own.nvlink, own.network, own.memory) == (300, links.network, 94)
    assert own.source.endswith("From the command line: nvlink = 300, memory = 94")
    with pytest.raises(UserError, match=r"--gpu must be one of h100, .*, got 'rtx4090'"):
        gpu_with_links("rtx4090")


def test_the_page_has_the_tables_of_today():
    page = scale_tables.PAGE.read_text()
    assert scale_tables.with_tables(page) == page, "python tests/support/scale_tables.py"
    assert all(f"<!-- {name}: begin -->" in page for name in scale_tables.TABLES)
