"""Arguments of a wrong kind: the error names what the user wrote, and what is allowed."""

from functools import partial

import pytest
import torch
from torch import nn

from ironmoe.moe import (
    Capacity,
    EnsembleRouter,
    ExpertChoiceRouter,
    MoE,
    RouterHealth,
    SoftMoE,
    TopKRouter,
    VMoE,
    aux_loss_in_eval,
    collect_aux_loss,
    freeze_weights,
    pad_images,
    routing_sites,
    save_upcycled,
    start_global_batch,
    trace_routing,
    upcycle,
    upcycle_by_recipe,
    update_selection_bias,
)

DIM = 6
LAYERS = {
    "MoE": lambda **options: MoE(DIM, 10, 4, **options),
    "MoE with a shared expert": lambda **options: MoE(DIM, 10, 4, shared_dim=3, **options),
    "MoE of expert choice": lambda **options: MoE(
        DIM, 10, 4, router=ExpertChoiceRouter(DIM, 4, **options), **options
    ),
    "SoftMoE": lambda **options: SoftMoE(DIM, 10, 4, **options),
}
ROUTERS = {"top k": TopKRouter, "expert choice": ExpertChoiceRouter}


def vit(**sizes):
    named = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8}
    return VMoE(**{**named, "num_classes": 3, "channels": 1, **sizes})


SIZES = {
    "dim": [
        lambda n: MoE(n, 10, 4),
        lambda n: SoftMoE(n, 10, 4),
        lambda n: TopKRouter(n, 4),
        lambda n: ExpertChoiceRouter(n, 4),
        lambda n: vit(dim=n),
    ],
    "hidden_dim": [lambda n: MoE(DIM, n, 4), lambda n: SoftMoE(DIM, n, 4)],
    "num_experts": [
        lambda n: MoE(DIM, 10, n),
        lambda n: SoftMoE(DIM, 10, n),
        lambda n: TopKRouter(DIM, n),
        lambda n: ExpertChoiceRouter(DIM, n),
        lambda n: EnsembleRouter(DIM, n, ensemble_size=1),
        lambda n: upcycle(vit(), n),
    ],
    "slots_per_expert": [lambda n: SoftMoE(DIM, 10, 4, n)],
    "ensemble_size": [lambda n: EnsembleRouter(DIM, 4, ensemble_size=n)],
    "multiple_of": [
        lambda n: Capacity(1.0, multiple_of=n),
        lambda n: ExpertChoiceRouter(DIM, 4, multiple_of=n),
    ],
    "places": [lambda n: Capacity(places=n)],
    "tokens_per_group": [lambda n: Capacity(1.0, tokens_per_group=n)],
    "image_size": [
        lambda n: vit(image_size=n),
        lambda n: pad_images([torch.rand(1, 4, 4)], image_size=n, patch_size=2),
    ],
    "patch_size": [lambda n: vit(patch_size=n)],
    "depth": [lambda n: vit(depth=n)],
    "heads": [lambda n: vit(heads=n)],
    "mlp_dim": [lambda n: vit(mlp_dim=n)],
    "num_classes": [lambda n: vit(num_classes=n)],
    "channels": [lambda n: vit(channels=n)],
    "expert_dim": [lambda n: vit(expert_dim=n)],
    "representation_size": [lambda n: vit(representation_size=n)],
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_no_whole_number_or_too_small_is_named(name):
    for make in SIZES[name]:
        for value in (2.0, "2", True):
            with pytest.raises(TypeError, match=f"^{name} must be a whole number, got {value!r}$"):
                make(value)
        for value in (0, -1):
            with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}$"):
                make(value)


@pytest.mark.parametrize("value", [2.0, "2", True])
@pytest.mark.parametrize(
    "make",
    [
        lambda k: MoE(DIM, 10, 4, k),
        lambda k: MoE(DIM, 10, 4, k, router=TopKRouter(DIM, 4)),
        lambda k: TopKRouter(DIM, 4, k),
        lambda k: EnsembleRouter(DIM, 4, k, ensemble_size=2),
        lambda k: upcycle(vit(), 4, k),
    ],
)
def test_a_top_k_that_is_no_whole_number_is_named(make, value):
    with pytest.raises(TypeError, match=f"^top_k must be a whole number, got {value!r}$"):
        make(value)


def test_a_shared_expert_has_a_whole_number_of_hidden_units():
    with pytest.raises(TypeError, match=r"shared_dim must be a whole number, got 3\.0"):
        MoE(DIM, 10, 4, shared_dim=3.0)
    with pytest.raises(ValueError, match="shared_dim must be at least 0, got -1"):
        MoE(DIM, 10, 4, shared_dim=-1)


@pytest.mark.parametrize(
    "make", [*LAYERS.values(), *(partial(r, DIM, 4) for r in ROUTERS.values())]
)
def test_a_dtype_that_is_none_of_floats_is_named(make):
    with pytest.raises(TypeError, match=r"^dtype must be a torch\.dtype or None, got 'float32'$"):
        make(dtype="float32")
    with pytest.raises(
        ValueError, match=r"^dtype must be a float dtype or None, got torch\.int32$"
    ):
        make(dtype=torch.int32)


def test_a_layer_takes_top_k_of_its_router_and_no_other():
    router = TopKRouter(DIM, 4, 3)
    with pytest.raises(ValueError, match="router must have top_k = 2 like the layer, got 3"):
        MoE(DIM, 10, 4, top_k=2, router=router)
    assert MoE(DIM, 10, 4, top_k=3, router=router).router is router
    assert MoE(DIM, 10, 4, router=router).router is router


def test_a_layer_may_have_any_top_k_where_experts_choose():
    router = ExpertChoiceRouter(DIM, 4)
    for top_k in (None, 2, 4):
        assert MoE(DIM, 10, 4, top_k=top_k, router=router).router is router


def test_a_layer_without_top_k_takes_two_experts_where_there_are_two():
    assert MoE(DIM, 10, 4).router.top_k == 2
    assert MoE(DIM, 10, 1).router.top_k == 1


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(2, 3, DIM).numpy(), "ndarray"),
        ([[0.0] * DIM], "list"),
        (torch.ones(2, 3, DIM, dtype=torch.int64), r"torch\.int64 of shape \(2, 3, 6\)"),
        (torch.ones(2, 3, DIM, dtype=torch.complex64), r"torch\.complex64 of shape \(2, 3, 6\)"),
    ],
)
def test_tokens_that_are_no_float_tensor_are_named(name, x, got):
    with pytest.raises(TypeError, match=rf"^x must be a float tensor \(.*, 6\), got {got}$"):
        LAYERS[name]()(x)


@pytest.mark.parametrize("name", LAYERS)
def test_a_single_number_is_no_token(name):
    with pytest.raises(ValueError, match=r"^x must have .*\(\)$"):
        LAYERS[name]()(torch.tensor(1.0))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_of_another_dtype_than_the_weights_are_named(name, dtype):
    layer = LAYERS[name]()
    x = torch.zeros(2, 3, DIM, dtype=dtype)
    said = rf"^x must be torch\.float32 like the weights of the layer, got {dtype}: use "
    with pytest.raises(ValueError, match=said):
        layer(x)
    assert layer.to(dtype)(x).dtype == dtype


def test_autocast_takes_tokens_of_another_dtype_than_the_weights():
    layer = MoE(DIM, 10, 4).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, DIM, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", LAYERS)
def test_tokens_on_another_device_than_the_weights_are_named(name):
    with pytest.raises(ValueError, match=r"^x must be on cpu like the weights .* got meta: use"):
        LAYERS[name]()(torch.zeros(2, 3, DIM, device="meta"))
    with pytest.raises(ValueError, match=r"^x must be on meta like the weights .* got cpu: use"):
        LAYERS[name](device="meta")(torch.zeros(2, 3, DIM))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_alone_names_what_is_wrong_with_its_tokens(name):
    router = ROUTERS[name](DIM, 4)
    with pytest.raises(ValueError, match=r"x must have 6 features .* got shape \(3, 7\)"):
        router(torch.zeros(3, 7))
    with pytest.raises(TypeError, match=r"x must be a float tensor \(…, 6\), got list"):
        router([[0.0] * DIM])
    with pytest.raises(ValueError, match="x must be on cpu like the weights"):
        router(torch.zeros(3, DIM, device="meta"))


def test_images_that_are_no_float_tensor_are_named():
    said = r"^images must be a float tensor \(B, 1, 8, 8\), got "
    with pytest.raises(TypeError, match=rf"{said}torch\.uint8 of shape \(2, 1, 8, 8\)$"):
        vit()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match=f"{said}ndarray$"):
        vit()(torch.zeros(2, 1, 8, 8).numpy())


def entered(block):
    with block:
        pass


@pytest.mark.parametrize(
    "use",
    [
        collect_aux_loss,
        RouterHealth,
        routing_sites,
        start_global_batch,
        update_selection_bias,
        lambda model: entered(aux_loss_in_eval(model)),
        lambda model: entered(freeze_weights(model)),
        lambda model: entered(trace_routing(model)),
        lambda model: upcycle(model, 4),
        lambda model: upcycle_by_recipe(model, {}),
        lambda model: save_upcycled(model, "nowhere"),
    ],
)
@pytest.mark.parametrize("model", [None, torch.zeros(1), nn.Linear])
def test_a_model_that_is_no_module_is_named(use, model):
    got = type(model).__name__
    with pytest.raises(TypeError, match=rf"^model must be an nn\.Module, got {got}$"):
        use(model)
