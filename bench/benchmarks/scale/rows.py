"""``ironmoe bench scale``: its rows, which programs read and of which tables are made."""

from collections.abc import Sequence
from typing import Any

from ironmoe.bench.benchmarks.passes import DX, FULL, INFERENCE
from ironmoe.bench.benchmarks.scale.alternatives import (
    experts_where_fastest,
    fastest,
    ranks_until,
    ranks_where_fastest,
    tokens_until,
    way_ms,
)
from ironmoe.bench.benchmarks.scale.exchange import counts_bytes, sent_rows
from ironmoe.bench.benchmarks.scale.layers import Layer, World
from ironmoe.bench.benchmarks.scale.memory import attack_memory, kept, training_memory
from ironmoe.bench.benchmarks.scale.meshes import best, layouts
from ironmoe.bench.benchmarks.scale.models import Model, counted
from ironmoe.bench.benchmarks.scale.times import Machine, layer_time
from ironmoe.bench.benchmarks.scale.ways import EP, FSDP2, REPLICAS

Row = dict[str, Any]
COST, PAYS, MESH, MEMORY = "cost", "pays", "mesh", "memory"
PARTS = (COST, PAYS, MESH, MEMORY)
PASSES_SHOWN = (INFERENCE, DX, FULL)


def cost_rows(layers: Sequence[Layer], worlds: Sequence[World], machine: Machine) -> list[Row]:
    """A row for each layer, number of ranks and pass.

    Keys: "sent_mb" (10⁶ bytes of rows that the mean rank sends to others), "off_node_mb" (of these,
    to other nodes), "counts_bytes" (that a rank sends ahead of them); milliseconds of the busiest
    rank: "exchange_ms", "experts_ms", "moving_ms", "shared_ms", "hidden_ms" (of the exchange), and
    "layer_ms", all together; "ratio": the exchange that nothing hides, divided by the experts.
    """
    rows = []
    for layer, world, pass_name in _cases(layers, worlds):
        sent, time = (
            sent_rows(layer, world, pass_name),
            layer_time(layer, world, pass_name, machine),
        )
        rows.append(
            _key(layer, world, pass_name, machine)
            | {
                "sent_mb": sent.to_others * 1e-6,
                "off_node_mb": sent.off_node * 1e-6,
                "counts_bytes": counts_bytes(layer.shape.num_experts, world.ranks),
                "exchange_ms": time.exchange,
                "experts_ms": time.experts,
                "moving_ms": time.moving,
                "shared_ms": time.shared,
                "hidden_ms": time.hidden,
                "layer_ms": time.total,
                "ratio": time.ratio,
            }
        )
    return rows


def pays_rows(layers: Sequence[Layer], worlds: Sequence[World], machine: Machine) -> list[Row]:
    """A row for each layer, number of ranks from 2, and pass.

    Keys: "ep_ms", "fsdp2_ms", "replicas_ms" of one layer; "fastest": of the ways whose memory
    suffices for the whole model, None where none's does; "tokens_fsdp2", "tokens_replicas": the
    largest number of tokens a rank at which EP is faster, 0 if it never is, None if it always is;
    "experts_from", "experts_to": the numbers of experts with which EP is the fastest that fits, on
    the row's ranks; "ranks_from", "ranks_to": the numbers of ranks on which it is, with the layer's
    own experts; "ranks_fsdp2", "ranks_replicas": the largest number of ranks on which EP is the
    faster one, whatever the memory, 0 if it never is.
    """
    rows = []
    for layer, world, pass_name in _cases(layers, worlds):
        if world.ranks == 1:
            continue
        case = layer, world, pass_name, machine
        experts = experts_where_fastest(*case) or (None, None)
        ranks = ranks_where_fastest(*case) or (None, None)
        rows.append(
            _key(layer, world, pass_name, machine)
            | {
                "ep_ms": way_ms(EP, *case),
                "fsdp2_ms": way_ms(FSDP2, *case),
                "replicas_ms": way_ms(REPLICAS, *case),
                "fastest": fastest(*case),
                "tokens_fsdp2": tokens_until(FSDP2, *case),
                "tokens_replicas": tokens_until(REPLICAS, *case),
                "experts_from": experts[0],
                "experts_to": experts[1],
                "ranks_from": ranks[0],
                "ranks_to": ranks[1],
                "ranks_fsdp2": ranks_until(FSDP2, *case),
                "ranks_replicas": ranks_until(REPLICAS, *case),
            }
        )
    return rows


def mesh_rows(layers: Sequence[Layer], gpus: int, world: World, machine: Machine) -> list[Row]:
    """A row for each layer, pass with a gradient, and layout of so many GPUs.

    Keys: "gpus", "ranks" (of an expert-parallel group), "between" (what the groups do), "layer_ms",
    "memory_gb" (on a GPU: the experts of all layers, and what these keep), "fits", and "fastest":
    whether it is the fastest that fits.
    """
    rows = []
    for layer in layers:
        for pass_name in (DX, FULL):
            found = layouts(layer, gpus, world, pass_name, machine)
            chosen = best(found, machine.links.memory)
            rows += [
                _key(layer, world._replace(ranks=layout.ranks), pass_name, machine)
                | {
                    "gpus": gpus,
                    "between": layout.between,
                    "layer_ms": layout.ms,
                    "memory_gb": layout.gigabytes,
                    "fits": layout.gigabytes <= machine.links.memory,
                    "fastest": layout == chosen,
                }
                for layout in found
            ]
    return rows


def memory_rows(models: Sequence[Model], worlds: Sequence[World], machine: Machine) -> list[Row]:
    """A row for each model and number of ranks.

    Keys: "experts", "rest" (numbers of parameters), "tokens" (of a rank); 10⁹ bytes on a rank:
    "attack_gb" (frozen weights), "weights_gb", "gradients_gb", "states_gb", "training_gb" (these
    three), "kept_gb" and "kept_training_gb" (by the MoE layers for a backward pass, under attack
    and in training), "recompute_gb" and "recompute_training_gb" (the same with recompute).
    """
    rows = []
    for model in models:
        sizes = counted(model)
        for world in worlds:
            if sizes.layer.shape.num_experts % world.ranks:
                continue
            frozen = attack_memory(sizes.experts, sizes.rest, world)
            trained = training_memory(sizes.experts, sizes.rest, world)
            rows.append(
                {
                    "gpu": machine.gpu.name,
                    "model": model.name,
                    "ranks": world.ranks,
                    "experts": sizes.experts,
                    "rest": sizes.rest,
                    "tokens": model.tokens,
                    "attack_gb": frozen.total * 1e-9,
                    "weights_gb": trained.weights * 1e-9,
                    "gradients_gb": trained.gradients * 1e-9,
                    "states_gb": trained.states * 1e-9,
                    "training_gb": trained.total * 1e-9,
                    "kept_gb": _kept_gb(sizes.layer, world),
                    "recompute_gb": _kept_gb(sizes.layer, world, recompute=True),
                    "kept_training_gb": _kept_gb(sizes.layer, world, trained=True),
                    "recompute_training_gb": _kept_gb(
                        sizes.layer, world, trained=True, recompute=True
                    ),
                }
            )
    return rows


def _kept_gb(
    layer: Layer, world: World, *, trained: bool = False, recompute: bool = False
) -> float:
    return layer.repeats * kept(layer, world, trained=trained, recompute=recompute).total * 1e-9


def _cases(layers: Sequence[Layer], worlds: Sequence[World]) -> list[tuple[Layer, World, str]]:
    """Each rank has as many experts as the others."""
    return [
        (layer, world, pass_name)
        for layer in layers
        for world in worlds
        if layer.shape.num_experts % world.ranks == 0
        for pass_name in PASSES_SHOWN
    ]


def _key(layer: Layer, world: World, pass_name: str, machine: Machine) -> Row:
    return {
        "gpu": machine.gpu.name,
        "shape": layer.shape.name,
        "sizes": layer.shape.sizes,
        "ranks": world.ranks,
        "pass": pass_name,
    }
