"""The official JAX V-MoE code's own numbers on a tiny random model (tests/data/README.md)."""

from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from ironmoe.attacks import PGD, attack_statistics
from ironmoe.moe import (
    Capacity,
    VMoE,
    aux_loss_in_eval,
    collect_aux_loss,
    freeze_weights,
    trace_routing,
)
from ironmoe.moe.metrics import image_overlap

GOLDEN = np.load(Path(__file__).parents[2] / "data" / "vmoe_tiny.npz")
CONFIG = literal_eval(str(GOLDEN["config"]))
PARAMS = {
    name.removeprefix("params/"): GOLDEN[name]
    for name in GOLDEN.files
    if name.startswith("params/")
}
VARIANTS = ("vanilla", "bpr", "cf4", "bf16", "indices")
LAYERS = {f"blocks.{i}.mlp": f"encoderblock_{i}" for i in CONFIG["moe_layers"]}


def golden(name):
    return torch.from_numpy(np.array(GOLDEN[name]))


def channels_first(images):
    return rearrange(images, "b h w c -> b c h w").contiguous()


X, Y = channels_first(golden("x")), golden("y").argmax(1)


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def official(variant):
    factor = 4 if variant == "cf4" else CONFIG["capacity_factor"]
    capacity = Capacity(
        factor, images_per_group=CONFIG["images_per_group"], priority=variant == "bpr"
    )
    dtype = torch.bfloat16 if variant == "bf16" else None
    return VMoE.from_jax(PARAMS, top_k=CONFIG["top_k"], capacity=capacity, dispatch_dtype=dtype)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_logits_losses_and_input_gradient(variant, auxiliary):
    model, name = official(variant), f"{variant}/aux{int(auxiliary)}"
    x = X.clone().requires_grad_()
    with aux_loss_in_eval(model), freeze_weights(model):
        logits = model(x)
        aux_loss = collect_aux_loss(model)
    logits_tolerance, grad_tolerance = (1e-4, 1e-2) if variant == "bf16" else (1e-5, 1e-5)
    torch.testing.assert_close(logits, golden(f"{name}/logits"), rtol=0, atol=logits_tolerance)
    torch.testing.assert_close(aux_loss, golden(f"{name}/aux_loss").mean(), rtol=0, atol=1e-6)
    losses = torch.nn.functional.cross_entropy(logits, Y, reduction="none") + auxiliary * aux_loss
    torch.testing.assert_close(
        losses, golden(f"{name}/loss_clean"), rtol=0, atol=2 * logits_tolerance
    )
    (grad,) = torch.autograd.grad(losses.mean(), [x])
    expected = channels_first(golden(f"{name}/grad_x"))
    assert (grad - expected).abs().max() <= grad_tolerance * expected.abs().max()


def test_auxiliary_loss_of_each_group():
    """A model that sees one group alone has that group's loss."""
    model = official("vanilla")
    for images, expected in zip(
        X.split(CONFIG["images_per_group"]), golden("vanilla/aux0/aux_loss"), strict=True
    ):
        with aux_loss_in_eval(model), torch.no_grad():
            model(images)
            torch.testing.assert_close(collect_aux_loss(model), expected, rtol=0, atol=1e-6)
    model(X)
    assert collect_aux_loss(model) == 0  # eval, outside the block


@pytest.mark.parametrize("images", ["clean", "adv"])
def test_combine_weights(variant, images):
    model = official(variant)
    x = X if images == "clean" else channels_first(golden(f"{variant}/aux0/x_adv"))
    with trace_routing(model) as trace, torch.no_grad():
        model(x)
    for name, layer in trace.layers.items():
        gates, experts = layer.intended if variant == "indices" else (layer.gates, layer.experts)
        weights = torch.zeros(len(gates), layer.num_experts + 1).scatter_(1, experts.long(), gates)[
            :, :-1
        ]
        expected = golden(f"{variant}/aux0/combine_{images}/{LAYERS[name]}").flatten(0, 1)
        # In bfloat16 a dispatched number beside a rounding boundary may go the other way: by 2⁻⁸ of
        # it in one of 32 terms of a logit, of which a gate takes a quarter at most.
        tolerance = 2**-10 if variant == "bf16" else 1e-5
        torch.testing.assert_close(weights, expected, rtol=0, atol=tolerance)
        assert torch.equal(weights > 0, expected > 0)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_the_papers_attack_takes_the_same_steps(variant, auxiliary):
    model, name = official(variant), f"{variant}/aux{int(auxiliary)}"
    eps, steps = CONFIG["epsilon"], CONFIG["steps"]
    first = PGD.vmoe(model, eps / steps, 1, auxiliary_loss=auxiliary).run(X, Y).adversarial
    grad = channels_first(golden(f"{name}/grad_x"))
    large = grad.abs() > (1e-2 if variant == "bf16" else 1e-4) * grad.abs().max()
    assert large.float().mean() > 0.9
    assert torch.equal((first - X).sign()[large], grad.sign()[large])

    result = PGD.vmoe(model, eps, steps, auxiliary_loss=auxiliary).run(X, Y)
    ours, theirs = result.adversarial - X, channels_first(golden(f"{name}/x_adv")) - X
    # ten chaotic steps: nearly all pixels, not all
    assert ((ours - theirs).abs() < eps / steps / 2).float().mean() > 0.95
    assert result.adversarial.abs().max() > 1  # not clipped to the valid pixels
    torch.testing.assert_close(
        result.distance, torch.full((len(X),), eps, dtype=torch.float64), rtol=1e-5, atol=0
    )
    correct = [result.clean_correct.sum().item(), (result.prediction == Y).sum().item()]
    assert correct == golden(f"{name}/state/num_correct").tolist()


def test_attack_statistics(variant):
    """The official sums, from the official adversarial images: "indices" sees the intended choice,
    the others the realised one."""
    model, name = official(variant), f"{variant}/aux0"
    found = attack_statistics(model, X, channels_first(golden(f"{name}/x_adv")), Y)
    assert (found.images, found.changed) == (len(X), int(golden(f"{name}/state/num_changes")))
    assert list(found.correct) == golden(f"{name}/state/num_correct").tolist()
    tolerance = 2e-3 if variant == "bf16" else 2e-4
    torch.testing.assert_close(
        torch.tensor(found.loss), golden(f"{name}/state/sum_loss"), rtol=tolerance, atol=0
    )
    change = found.routing_change("intended" if variant == "indices" else "realised")
    for layer, official_name in LAYERS.items():
        expected = 1 - float(golden(f"{name}/state/sum_iou/{official_name}")) / len(X)
        assert change[layer] == pytest.approx(expected, abs=1e-6)


def test_image_overlap_adds_up_to_the_official_sum(variant):
    model, name, traces = official(variant), f"{variant}/aux0", []
    for images in (X, channels_first(golden(f"{name}/x_adv"))):
        with trace_routing(model) as trace, torch.no_grad():
            model(images)
        traces.append(trace.layers)
    reading = "intended" if variant == "indices" else "realised"
    for layer, official_name in LAYERS.items():
        overlap_B = image_overlap(*(trace[layer] for trace in traces), len(X), reading)
        assert overlap_B.sum().item() == pytest.approx(
            float(golden(f"{name}/state/sum_iou/{official_name}")), abs=1e-5
        )


def test_a_token_dropped_twice_counts_as_changed_only_in_the_official_reading():
    model = VMoE.from_jax(PARAMS, top_k=1, capacity=Capacity(0.5, images_per_group=4))
    found = attack_statistics(model, X, X, Y)
    realised, intended, kept = (
        found.routing_change(reading) for reading in ("realised", "intended", "kept")
    )
    assert max(realised.values()) > 0.01  # with no attack at all
    assert set(intended.values()) == set(kept.values()) == {0.0}


def test_statistics_of_batches_add_up_and_padding_does_not_count():
    model, adversarial = official("vanilla"), channels_first(golden("vanilla/aux0/x_adv"))
    whole = attack_statistics(model, X, adversarial, Y)
    halves = [
        attack_statistics(model, X[part], adversarial[part], Y[part])
        for part in (slice(0, 4), slice(4, 8))
    ]
    total = halves[0] + halves[1]
    assert (total.images, total.changed, total.correct) == (
        whole.images,
        whole.changed,
        whole.correct,
    )
    assert total.loss == pytest.approx(whole.loss, rel=1e-5)
    for reading in total.overlap:
        assert total.routing_change(reading) == pytest.approx(
            whole.routing_change(reading), abs=1e-12
        )
    padded = attack_statistics(model, X, adversarial, Y, valid=torch.arange(8) < 4)
    assert padded.images == 4 and padded.routing_change() == pytest.approx(
        halves[0].routing_change(), abs=1e-12
    )
