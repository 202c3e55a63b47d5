"""How a model uses its experts on clean images: what the number of experts means."""

import math

from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.moe import trace_routing
from ironmoe.moe.metrics import dormant_experts, entropy


@measurement(
    "expert use",
    "how evenly tokens of clean images go to the experts, and what their gates add up to",
    settings=("images",),
    passes=lambda budget: budget.images / 2,
    needs_experts=True,
)
def expert_use(subject: Subject, budget: Budget) -> Outcome:
    """Means over layers, and of each layer with ":layer" behind the name: "gate_sum", of a token's
    gates; "load_entropy", exp of the entropy of the load, the number of experts if all are used
    alike; "dormant", how many experts no token takes."""
    images, _ = subject.sample(budget.images)
    with trace_routing(subject.model) as trace:
        subject.logits(images, budget.batch_size)

    values: dict[str, float] = {}
    for name, layer in trace.layers.items():
        of_layer = {
            "gate_sum": float(layer.gates.sum(1).double().mean()),
            "load_entropy": math.exp(float(entropy(layer.load().double()))),
            "dormant": float(len(dormant_experts(layer))),
        }
        for what, value in of_layer.items():
            values[f"{what}:{name}"] = value
            values[what] = values.get(what, 0.0) + value / len(trace.layers)
    return Outcome(values)
