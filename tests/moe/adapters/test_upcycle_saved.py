"""Upcycled transformers models survive save_pretrained and from_pretrained."""

import copy
import json
import pickle

import pytest
import torch

from ironmoe.moe import Capacity, MoE, huggingface, recipe_of, upcycle

transformers = pytest.importorskip("transformers", minversion="5.17")

VIT = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_labels": 5,
}
STAGES = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 12, 16, 24], "image_size": 32}
SWIN = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "image_size": 32}
# The MLP is a module; lies in its block; is two modules of the block.
FAMILIES = {
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {**STAGES, "num_labels": 5}),
    "swin v2": ("Swinv2ForImageClassification", "Swinv2Config", {**SWIN, "num_labels": 5}),
}


@pytest.fixture(autouse=True)
def registered():
    huggingface.register()


def dense(family):
    model, config, options = FAMILIES[family]
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def upcycled(family, **options):
    return upcycle(dense(family), 4, layers="every 2", noise=0.1, **options).eval()


def pixels(model):
    return torch.rand(
        2, 3, *[model.config.image_size] * 2, generator=torch.Generator().manual_seed(0)
    )


def outputs(model, images):
    """Of a copy, whose weights begin where torch lets them begin: those from a file lie anywhere,
    and BLAS may then add in another order."""
    return copy.deepcopy(model)(images)[0]


def assert_equal(twin, model):
    assert type(twin) is type(model) and recipe_of(twin) == recipe_of(model)
    assert outputs(twin, pixels(model)).equal(outputs(model, pixels(model)))
    assert all(twin.state_dict()[name].equal(value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back(family, tmp_path):
    model = upcycled(family)
    model.save_pretrained(tmp_path / "first")
    twin = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "first")
    assert_equal(twin, model)
    twin.save_pretrained(tmp_path / "second", max_shard_size="20KB")
    assert (tmp_path / "second" / "model.safetensors.index.json").exists()
    assert_equal(type(model).from_pretrained(tmp_path / "second", device_map="cpu"), model)
    assert recipe_of(tmp_path / "second") == recipe_of(model)


def test_routers_and_layers_have_the_options_they_had(tmp_path):
    router = {"noise_std": 0.0, "balance": "mixtral", "balance_weight": 0.02, "score": "sigmoid"}
    model = upcycled("vit", router=router, capacity=Capacity(0.5, images_per_group=1))
    upcycle(model, 2, 1, layers=[0])
    model.save_pretrained(tmp_path)
    twin = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_equal(twin, model)
    layers = [[m for m in some.modules() if isinstance(m, MoE)] for some in (model, twin)]
    assert [layer.num_experts for layer in layers[1]] == [2, 4, 4]
    for layer, other in zip(*layers, strict=True):
        assert repr(layer) == repr(other)
        assert layer.router.balance_weight == other.router.balance_weight


@pytest.mark.parametrize("how", ["path", "object", "dense object", "none"])
def test_a_configuration_may_be_given(how, tmp_path):
    model = upcycled("vit")
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    before = config.to_dict()
    given = {"path": str(tmp_path), "object": config, "dense object": model.config}
    options = {"config": given[how]} if how in given else {}
    twin, info = type(model).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert_equal(twin, model)
    assert not info["missing_keys"] and config.to_dict() == before
    assert not {"ironmoe_upcycling", "transformers_weights"} & set(twin.config.to_dict())


def test_another_dtype_and_the_selection_bias_beside_it(tmp_path):
    model = upcycled("vit", router={"selection_bias": True})
    bias = model.vit.get_submodule(recipe_of(model.vit)["steps"][0]["mlps"][0]).router
    bias.selection_bias += 1 / 3
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    router = next(m for m in twin.modules() if isinstance(m, MoE)).router
    assert router.selection_bias.equal(bias.selection_bias)  # in float32
    twin.train()(pixels(model).bfloat16())[0].sum().backward()
    assert router.choices.sum() == 2 * 5 * 2  # images, tokens, experts of each


def test_the_body_of_a_model_and_a_head_on_a_body(tmp_path):
    model = upcycled("vit")
    model.save_pretrained(tmp_path / "model")
    body = transformers.AutoModel.from_pretrained(tmp_path / "model")
    assert outputs(body, pixels(model)).equal(outputs(model.vit, pixels(model)))
    model.vit.save_pretrained(tmp_path / "body")
    again = type(model).from_pretrained(tmp_path / "body")
    assert outputs(again.vit, pixels(model)).equal(outputs(model.vit, pixels(model)))
    assert recipe_of(again) == recipe_of(model) != recipe_of(body)


def test_one_tower_of_clip(tmp_path):
    text = {name: VIT[name] for name in list(VIT)[2:6]}
    text |= {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=VIT)
    model = transformers.CLIPModel(config).eval()
    upcycle(model.vision_model, 4, layers="last 1", noise=0.1)
    model.save_pretrained(tmp_path)
    twin = transformers.AutoModel.from_pretrained(tmp_path)
    inputs = {"input_ids": torch.randint(3, 64, (2, 7)), "pixel_values": torch.rand(2, 3, 16, 16)}
    logits = [copy.deepcopy(each)(**inputs).logits_per_image for each in (twin, model)]
    assert logits[0].equal(logits[1])
    assert recipe_of(twin) == recipe_of(model)


def test_dense_models_are_saved_and_loaded_as_before(tmp_path):
    model = dense("vit")
    sparse = upcycle(type(model)(model.config), 4)  # they share their configuration
    model.save_pretrained(tmp_path)
    assert recipe_of(tmp_path) is None and recipe_of(sparse) is not None
    assert "transformers_weights" not in json.loads((tmp_path / "config.json").read_text())
    assert_equal(type(model).from_pretrained(tmp_path), model)
    with pytest.raises(OSError, match="nowhere"):
        type(model).from_pretrained(str(tmp_path / "nowhere"), local_files_only=True)


def change(folder, **recipe):
    config = json.loads((folder / "config.json").read_text())
    config["ironmoe_upcycling"].update(recipe)
    (folder / "config.json").write_text(json.dumps(config))


def test_what_does_not_fit_is_an_error(tmp_path):
    model = upcycled("convnext")
    model.save_pretrained(tmp_path)
    load = transformers.AutoModelForImageClassification.from_pretrained
    (step,) = recipe_of(model)["steps"]
    change(tmp_path, steps=[{**step, "mlps": ["layers.0"]}])
    with pytest.raises(ValueError, match=r"got layers\.0, which ConvNextForImageClassif.* lacks"):
        load(tmp_path)
    first = step["mlps"][0].replace("stages.1.layers.0", "stages.0.layers.0")
    change(tmp_path, steps=[{**step, "mlps": [first]}])
    with pytest.raises(ValueError, match=r"the weights must be those .* got none for .*stages\.0"):
        load(tmp_path)
    change(tmp_path, steps=[step], format=2)
    with pytest.raises(ValueError, match="format 2: a newer ironmoe may read it"):
        load(tmp_path)
    with pytest.raises(ValueError, match="push_to_hub must be False for an upcycled model"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_no_library_takes_it_for_a_quantised_model(tmp_path):
    model = upcycled("vit")
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path)
    for name in ("is_quantized", "hf_quantizer", "quantization_method"):
        assert not getattr(twin, name, None)
    assert not hasattr(twin.config, "quantization_config")
    assert twin.to(torch.float64).dtype == torch.float64


def test_adapters_of_peft_are_merged_and_saved(tmp_path):
    peft = pytest.importorskip("peft")
    model = upcycled("vit")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "query"]))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert_equal(type(merged).from_pretrained(tmp_path), merged)


def test_trainer_trains_it_and_its_checkpoints_come_back(tmp_path):
    pytest.importorskip("accelerate")
    model = upcycled("vit")
    model.save_pretrained(tmp_path / "start")
    model = type(model).from_pretrained(tmp_path / "start")
    before = copy.deepcopy(model.state_dict())
    data = [{"pixel_values": image, "labels": 1} for image in torch.rand(4, 3, 16, 16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    transformers.Trainer(model, arguments, train_dataset=data).train()
    model.eval()
    assert any(not value.equal(before[name]) for name, value in model.state_dict().items())
    assert_equal(type(model).from_pretrained(tmp_path / "run" / "checkpoint-1"), model)


@pytest.fixture
def elsewhere(monkeypatch):
    """transformers as it is in a process that knows nothing of ironmoe."""
    model = transformers.PreTrainedModel
    load, save = model.from_pretrained.__func__, model.save_pretrained
    monkeypatch.setattr(model, "from_pretrained", classmethod(load.__wrapped__))
    monkeypatch.setattr(model, "save_pretrained", save.__wrapped__)


@pytest.mark.parametrize("family", FAMILIES)
def test_elsewhere_loading_fails_aloud(family, tmp_path, request):
    model = upcycled(family)
    model.save_pretrained(tmp_path)
    request.getfixturevalue("elsewhere")
    for kind in ("AutoModelForImageClassification", "AutoModel", type(model).__name__):
        with pytest.raises(OSError, match=r"call-ironmoe\.moe\.huggingface\.register-first"):
            getattr(transformers, kind).from_pretrained(tmp_path)
    huggingface.register()
    assert_equal(type(model).from_pretrained(tmp_path), model)


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_and_a_pickle_are_saved_with_their_recipe_elsewhere(how, tmp_path, request):
    model = upcycled("convnext")
    pickled = pickle.dumps(model)
    request.getfixturevalue("elsewhere")
    twin = copy.deepcopy(model) if how == "copied" else pickle.loads(pickled)
    twin.save_pretrained(tmp_path)
    huggingface.register()
    assert_equal(type(model).from_pretrained(tmp_path), model)
