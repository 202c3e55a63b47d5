"""What an upcycled model is made of survives copies, pickles and files."""

import copy
import inspect
import json
import pickle

import pytest
import staged_twins as staged
import torch
import twins
from torch import nn

from ironmoe.moe import (
    Capacity,
    EnsembleRouter,
    ExpertGroups,
    MoE,
    TopKRouter,
    load_upcycled,
    recipe_of,
    save_upcycled,
    upcycle,
    upcycle_by_recipe,
)

IMAGES = torch.rand(2, 3, staged.SIDE, staged.SIDE, generator=torch.Generator().manual_seed(0))
safetensors = pytest.importorskip("safetensors.torch")

ROUTER = {
    "noise_std": 0.5,
    "score": "sigmoid",
    "groups": ExpertGroups(2, 1, "max"),
    "selection_bias": True,
    "bias": True,
    "softcap": 30.0,
}
OPTIONS = {
    "capacity": Capacity(0.5, tokens_per_group=8, priority=True),
    "dispatch_dtype": torch.bfloat16,
    "recompute": True,
}


def encoder():
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2, enable_nested_tensor=False
    )


def shared():
    model = twins.Encoder(3)
    model.blocks[2].mlp = model.blocks[0].mlp
    return model


def shared_block():
    model = staged.TorchvisionConvNeXt()
    model.features[3][1] = model.features[3][0]
    return model


# name → the dense model, an input, and how it is upcycled
MODELS = {
    "experts that all tokens take": (
        lambda: twins.Encoder(2),
        torch.randn(2, 3, twins.DIM),
        lambda model: upcycle(model, 4, noise=0.1, shared_dim=8, shared_gate=True),
    ),
    "every option": (
        lambda: twins.Encoder(2),
        torch.randn(2, 3, twins.DIM),
        lambda model: upcycle(model, 4, router=ROUTER, noise=0.1, **OPTIONS),
    ),
    "one expert a token": (
        lambda: twins.Encoder(2),
        torch.randn(2, 3, twins.DIM),
        lambda model: upcycle(model, 4, 1, noise=0.1),
    ),
    "twice": (
        staged.MlpMixer,
        IMAGES,
        lambda model: upcycle(
            upcycle(model, 4, layers=[1], noise=0.1), 2, layers=[0, 2], mlp="mlp_tokens", noise=0.1
        ),
    ),
    "a part": (
        lambda: nn.ModuleDict({"a": twins.Encoder(2), "b": twins.Encoder(2)}),
        None,
        lambda model: upcycle(model["b"].blocks, 4, noise=0.1) and model,
    ),
    "1 × 1 convolutions": (
        lambda: staged.TimmConvNeXt(staged.ConvMlp),
        IMAGES,
        lambda model: upcycle(model, 4, layers="last 1", noise=0.1),
    ),
    "in the block": (
        staged.TorchvisionConvNeXt,
        IMAGES,
        lambda model: upcycle(model, 4, noise=0.1),
    ),
    "an encoder": (
        encoder,
        torch.randn(2, 3, 8),
        lambda model: upcycle(model, 4, layers=[1], noise=0.1),
    ),
    "a shared MLP": (
        shared,
        torch.randn(2, 3, twins.DIM),
        lambda model: upcycle(model, 4, layers=[0, 2], noise=0.1),
    ),
    "a shared block": (
        shared_block,
        IMAGES,
        lambda model: upcycle(model, 4, noise=0.1),
    ),
    "a single MLP": (
        twins.TimmMlp,
        torch.randn(2, 3, twins.DIM),
        lambda model: upcycle(model, 4, noise=0.1),
    ),
    "convolutions alone": (
        lambda: staged.ConvMlp(8, 12),
        torch.rand(2, 8, 3, 3),
        lambda model: upcycle(model, 4, noise=0.1),
    ),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, x, how = MODELS[request.param]
    model = how(make()).eval()
    for parameter in model.parameters():  # what a fresh model cannot have by chance
        parameter.data += 0.01 * torch.randn_like(parameter)
    return make, x, model


def assert_equal(twin, model, x):
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert all(twin.state_dict()[name].equal(value) for name, value in model.state_dict().items())
    assert recipe_of(twin) == recipe_of(model)
    if x is not None:
        assert twin.eval()(x).equal(model(x))
    for layer, other in zip(moes(twin), moes(model), strict=True):
        assert layer.extra_repr() == other.extra_repr()
        assert layer.router.extra_repr() == other.router.extra_repr()


def moes(model):
    return [module for module in model.modules() if isinstance(module, MoE)]


def test_a_file_holds_what_the_dense_model_lacks(case, tmp_path):
    make, x, model = case
    save_upcycled(model, path := tmp_path / "model.safetensors")
    assert recipe_of(path) == recipe_of(str(path)) == recipe_of(model)
    assert_equal(load_upcycled(make(), path), model, x)


def test_a_recipe_goes_with_weights_that_are_saved_by_hand(case):
    make, x, model = case
    recipe = json.loads(json.dumps(recipe_of(model)))
    twin = upcycle_by_recipe(make(), recipe)
    twin.load_state_dict(model.state_dict())
    assert_equal(twin, model, x)


def test_a_recipe_is_followed_on_the_meta_device(case):
    make, x, model = case
    with torch.device("meta"):
        twin = make()
    twin = upcycle_by_recipe(twin, recipe_of(model))
    assert all(parameter.is_meta for parameter in twin.parameters())
    twin.load_state_dict(model.state_dict(), assign=True)
    assert_equal(twin, model, x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_know_their_recipe(case, copied):
    _, x, model = case
    assert_equal(copied(model), model, x)


def test_the_state_of_a_model_has_no_trace_of_the_recipe():
    model = upcycle(twins.Encoder(1), 4, noise=0.1)
    names = {f"{a}.{b}" for a in ("fc1", "fc2") for b in ("weight", "bias")} | {"router.weight"}
    assert model.blocks[0].mlp.state_dict().keys() == names


def test_a_recipe_says_which_mlps_with_which_options():
    model = upcycle(twins.Encoder(4), 4, layers="last 1", router=ROUTER, noise=0.1, **OPTIONS)
    upcycle(model, 2, 1, layers=[0, 2])
    second, first = recipe_of(model)["steps"]
    assert first["mlps"] == ["blocks.3.mlp"] and first["noise"] == 0.1
    assert first["router"] == {
        "num_experts": 4, "top_k": 2, "renormalize": True, "noise_std": 0.5,
        "importance_weight": 0.005, "load_weight": 0.005, "balance_weight": 0.0,
        "balance": "gshard", "z_weight": 0.0, "score": "sigmoid", "order": "score_first",
        "groups": {"ExpertGroups": {"num_groups": 2, "keep": 1, "score": "max"}}, "scale": 1.0,
        "bias": True, "selection_bias": True, "jitter": 0.0, "softcap": 30.0,
    }  # fmt: skip
    capacity = {
        "factor": 0.5, "images_per_group": None, "tokens_per_group": 8, "priority": True,
        "multiple_of": 4, "places": None, "renormalize": False,
    }  # fmt: skip
    assert first["moe"] == {
        "capacity": {"Capacity": capacity}, "dispatch_dtype": {"dtype": "bfloat16"},
        "recompute": True, "precision": "ieee", "shared_dim": 0, "shared_gate": False,
    }  # fmt: skip
    assert second["mlps"] == ["blocks.0.mlp", "blocks.2.mlp"] and second["noise"] == 0
    assert (second["router"]["scale"], second["router"]["renormalize"]) == (2.0, False)
    assert recipe_of(model.blocks[3])["steps"] == [{**first, "mlps": ["mlp"]}]


def test_a_recipe_names_all_arguments_of_a_layer_but_those_of_the_dense_mlp():
    (step,) = recipe_of(upcycle(twins.Encoder(1), 4))["steps"]
    of_the_mlp = {"dim", "hidden_dim", "activation", "device", "dtype"}
    of_a_layer = set(inspect.signature(MoE).parameters) - of_the_mlp - {"bias", "router"}
    assert set(step["moe"]) == of_a_layer - {"num_experts", "top_k"}
    assert set(step["router"]) == set(inspect.signature(TopKRouter).parameters) - of_the_mlp


def test_a_recipe_is_read_off_the_layers_as_they_are_now():
    model = upcycle(twins.Encoder(2), 4)
    model.blocks[0].mlp.router.noise_std = 0.25
    model.blocks[1].mlp.capacity = Capacity(places=4)
    twin = upcycle_by_recipe(twins.Encoder(2), recipe_of(model))
    assert [layer.router.noise_std for layer in moes(twin)] == [0.25, 1.0]
    assert [getattr(layer.capacity, "places", None) for layer in moes(twin)] == [None, 4]


def test_files_and_models_without_a_recipe_have_none(tmp_path):
    assert recipe_of(twins.Encoder(2)) is None
    assert recipe_of(nn.Sequential(MoE(8, 8, 2))) is None
    dense = twins.Encoder(1)
    safetensors.save_model(dense, str(tmp_path / "plain.safetensors"))
    safetensors.save_model(dense, str(tmp_path / "other.safetensors"), {"format": "pt"})
    torch.save(dense.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "short").write_bytes(b"abc")
    (tmp_path / "long").write_bytes(b"\xff" * 100)
    (tmp_path / "text").write_bytes((20).to_bytes(8, "little") + b"no json at all.......")
    for path in [*tmp_path.iterdir(), tmp_path]:
        assert recipe_of(path) is None
    with pytest.raises(FileNotFoundError):
        recipe_of(tmp_path / "missing")
    with pytest.raises(ValueError, match="model must have been upcycled, got a Encoder without"):
        save_upcycled(dense, tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match=r"path must be a file that save_upcycled .*plain"):
        load_upcycled(dense, tmp_path / "plain.safetensors")


def test_a_recipe_that_is_not_understood_is_refused(tmp_path):
    model = upcycle(twins.Encoder(2), 4)
    recipe = recipe_of(model)
    (step,) = recipe["steps"]
    wrong = [
        (None, "recipe must be a dict with a format and steps, got None"),
        ({"format": 2, "steps": []}, "must have format 1, which .* got format 2: a newer ironmoe"),
        ({**recipe, "more": 1}, "a format and steps and nothing else"),
        ({**recipe, "steps": []}, "a format and steps and nothing else"),
        ({**recipe, "steps": [{"mlps": []}]}, "a step of a recipe must have mlps, moe, noise, rou"),
        ({**recipe, "steps": [{**step, "mlps": ["blocks.7.mlp"]}]}, r"got blocks\.7\.mlp, which E"),
        ({**recipe, "steps": [{**step, "mlps": ["blocks.1"]}]}, r"blocks\.1 \(Block\) is not a"),
        ({**recipe, "steps": [{**step, "router": {"colour": 1}}]}, "options of this .*colour"),
        ({**recipe, "steps": [{**step, "moe": {"capacity": {"Law": {}}}}]}, "capacity in a recipe"),
    ]
    for content, message in wrong:
        with pytest.raises(ValueError, match=message):
            upcycle_by_recipe(twins.Encoder(2), content)
    newer = {"ironmoe_upcycling": json.dumps({"format": 2, "steps": []})}
    safetensors.save_model(model, str(tmp_path / "newer.safetensors"), newer)
    for read in (recipe_of, lambda path: load_upcycled(twins.Encoder(2), path)):
        with pytest.raises(ValueError, match="got format 2: a newer ironmoe may read it"):
            read(tmp_path / "newer.safetensors")


def test_weights_of_another_model_are_refused(tmp_path):
    save_upcycled(upcycle(twins.Encoder(2), 4), path := tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"blocks\.2"):
        load_upcycled(twins.Encoder(3), path)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp, which Encoder lacks"):
        load_upcycled(twins.Encoder(1), path)
    with pytest.raises(ValueError, match=r"but blocks\.0\.mlp is an MoE already"):
        load_upcycled(upcycle(twins.Encoder(2), 4), path)


class OwnCapacity(Capacity):
    pass


def test_a_layer_that_no_recipe_can_describe_is_no_part_of_one():
    model = upcycle(twins.Encoder(1), 4, capacity=OwnCapacity(1.0))
    with pytest.raises(TypeError, match=r"capacity must be a number.*got OwnCapacity"):
        recipe_of(model)
    model = upcycle(twins.Encoder(1), 4)
    model.blocks[0].mlp.router = EnsembleRouter(twins.DIM, 4, 1, ensemble_size=2)
    with pytest.raises(TypeError, match=r"router must be a TopKRouter, .* got a EnsembleRouter"):
        recipe_of(model)
