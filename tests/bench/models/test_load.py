"""Names of models: what they may be, what follows the question mark, and functions of one's own."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jpegs import write_jpegs
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from ironmoe.attacks.data import DataError
from ironmoe.attacks.data.decoding import read_image
from ironmoe.bench.cli.app import app
from ironmoe.bench.common.query import read_value, split_query
from ironmoe.bench.data.in_memory import load_data
from ironmoe.bench.models.class_matching import match
from ironmoe.bench.models.kinds.tensorflow_resize import TensorFlowResize
from ironmoe.bench.models.load import FORMS, load_model
from ironmoe.bench.models.overrides import Overrides
from ironmoe.bench.models.registry import Source
from ironmoe.moe import CheckpointError, VMoE
from ironmoe.moe.checkpoints.write import write_vmoe_checkpoint

CPU = torch.device("cpu")
PROGRAM = """
import torch
def make(classes=4, width=1.5, name="net", deep=False, more=None):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, classes))
    model.got = (classes, width, name, deep, more)
    return model
class Both(torch.nn.Module):
    def forward(self, x):
        return {"features": x, "logits": x.mean((2, 3))}
ready = torch.nn.Flatten()
def shifted(mean=0.5, saved=False):
    model = make()
    if saved is None:
        model.means = [torch.tensor(mean)]
    else:
        model.register_buffer("mean", torch.tensor(mean), persistent=saved)
    return model
def grey(rules=None):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
    if rules is not None:
        from ironmoe.attacks.data import Preprocessing
        model.preprocessing = {
            "size": Preprocessing(channels=1, resize=(6, 6), mode="square"),
            "mean": Preprocessing(channels=1, mean=(0.5,), std=(0.5,)),
            "other": "of another kind",
        }[rules]
    return model
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "some_models.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "some_models", raising=False)


def test_every_form_is_named():
    prefixes = ("timm:", "hf:", "torchvision:", "robustbench:", "vmoe:", "package.module:")
    for form in (*prefixes, "FILE.pt2", "FILE.pt "):
        assert form in FORMS


def test_a_function_gets_what_the_query_sets(functions):
    spec = "some_models:make?classes=7&width=0.5&name=a%26b+c&deep=true&more=none"
    loaded = load_model(None, spec, CPU)
    assert loaded.model.got == (7, 0.5, "a&b+c", True, None)
    assert loaded.source == f"--model {spec}" and loaded.identity == spec
    assert loaded.pipeline is None and loaded.facts["stem"] == "some_models-make"
    assert load_model(None, "some_models:make", CPU).model.got == (4, 1.5, "net", False, None)


@pytest.mark.parametrize("saved", [False, None])
def test_tensors_beside_the_weights_make_another_model(functions, saved, monkeypatch):
    """A run would else go on after such a tensor was changed in the file of the function."""
    spec, seen = f"some_models:shifted?saved={saved}", []
    for mean in ("0.5", "0.5", "0.25"):
        file = Path("some_models.py")
        file.write_text(PROGRAM.replace("mean=0.5", f"mean={mean}") + "# " + 9 * mean)
        monkeypatch.delitem(sys.modules, "some_models", raising=False)
        importlib.invalidate_caches()
        seen.append(load_model(None, spec, CPU).identity)
    assert seen[0] == seen[1] != seen[2]
    assert load_model(None, "some_models:shifted?saved=true", CPU).identity.endswith("saved=true")


def test_a_function_may_return_more_than_logits(functions):
    pixels = torch.rand(2, 3, 2, 2)
    model = load_model(None, "some_models:Both", CPU).model
    assert torch.equal(model(pixels), pixels.mean((2, 3)))


def test_overrides_come_with_the_name(functions):
    overrides = Overrides.parse(crop="2", mean="0.5", std="0.5")
    loaded = load_model(None, "some_models:ready", CPU, overrides=overrides)
    pixels = torch.rand(2, 3, 2, 2)
    torch.testing.assert_close(loaded.model(pixels), (2 * pixels - 1).flatten(1))
    assert loaded.pipeline.size == (2, 2)


def test_a_function_may_say_how_its_model_wants_pictures(functions):
    """A model of grey images takes photos in colour."""
    loaded = load_model(None, "some_models:grey?rules=size", CPU)
    assert loaded.preprocessing.endswith("(preprocessing of some_models:grey)")
    picture = Image.new("RGB", (20, 9), (10, 200, 50))
    pixels = loaded.pipeline(picture.convert("L"))
    assert pixels.shape == (1, 6, 6)
    assert loaded.model(pixels[None].float() / 255).shape == (1, 3)
    assert load_model(None, "some_models:grey?rules=other", CPU).pipeline is None
    with pytest.raises(CheckpointError, match=r"without mean and std.* or --mean and --std"):
        load_model(None, "some_models:grey?rules=mean", CPU)


def test_an_image_of_other_channels_is_refused_with_what_to_do(functions):
    loaded = load_model(None, "some_models:grey", CPU)
    message = "The model takes 1 channel, and the images have 3 channels: the model of a function"
    with pytest.raises(CheckpointError, match=message) as caught:
        match(loaded, torch.rand(1, 3, 6, 6), None, None, data="photos")
    assert "Preprocessing(channels=1, …)" in str(caught.value)
    with pytest.raises(CheckpointError) as caught:  # its size is wrong
        match(loaded, torch.rand(1, 3, 5, 5), None, None, data="photos")
    assert "channel" not in str(caught.value)


def test_image_size_beside_a_model_with_rules_must_be_theirs(functions, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (20, 9)).save(tmp_path / "photos" / name / "1.png")
    pipeline = load_model(None, "some_models:grey?rules=size", CPU).pipeline
    data = load_data(str(tmp_path / "photos"), 6, pipeline=pipeline)
    assert data.images.shape == (2, 1, 6, 6)
    with pytest.raises(DataError, match="--image-size is for models that say nothing"):
        load_data(str(tmp_path / "photos"), 7, pipeline=pipeline)


def test_help_names_every_form():
    told = CliRunner().invoke(app, ["attack", "--help"]).output
    assert FORMS in " ".join(told.split())


WRONG = {
    "argument": ("some_models:make?wings=2", "a function that takes the arguments {'wings': 2}"),
    "module": ("some_models:ready?wings=2", "is a module and takes no arguments, got {'wings': 2}"),
    "no kind": ("resnet50", "--model must be timm:NAME?checkpoint=FILE, hf:FOLDER"),
    "nothing": ("timm:", "--model must be timm:NAME?checkpoint=FILE, got 'timm:'"),
    "key": ("hf:folder?wings=2", "may set processor, got wings='2'"),
    "priority": ("vmoe:prefix?priority=2", "may set top_k, capacity, images_per_group, priority"),
    "value": ("some_models:make?classes", "must be NAME?key=value&key=value with each key once"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case, functions):
    spec, message = WRONG[case]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(None, spec, CPU)


def test_values_are_numbers_words_or_text():
    read = [read_value(text) for text in ("3", "-0.5", "1e-3", "True", "false", "none", "a/b.pth")]
    assert read == [3, -0.5, 1e-3, True, False, None, "a/b.pth"]
    assert split_query("hf:a+b/c?x=1&y=%3F") == ("hf:a+b/c", {"x": "1", "y": "?"})


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The prefix of an official checkpoint for images of 16 × 16."""
    pytest.importorskip("msgpack")
    torch.manual_seed(0)
    model = VMoE(
        image_size=16, patch_size=8, dim=16, depth=2, heads=2, mlp_dim=16, num_classes=4,
        moe_layers=(1,), num_experts=4, top_k=2, classifier="token",
    )  # fmt: skip
    nn.init.normal_(model.head.weight)
    prefix = str(tmp_path_factory.mktemp("official") / "tiny")
    write_vmoe_checkpoint(prefix, model.to_jax())
    return prefix, model.eval()


def test_an_official_model_has_its_own_size_or_that_of_the_data(official):
    prefix, model = official
    own = load_model(None, f"vmoe:{prefix}?top_k=2", CPU)
    assert own.image_shape == (3, 16, 16) and own.pipeline.size == (16, 16)
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(own.model(pixels), model(2 * pixels - 1), rtol=1e-4, atol=1e-5)

    larger = load_model(None, f"vmoe:{prefix}?top_k=2", CPU, image_size=(24, 24))
    assert larger.image_shape == (3, 24, 24) and larger.pipeline.size == (24, 24)
    with pytest.raises(CheckpointError, match=r"takes square images only, got .* 24 × 32"):
        load_model(None, f"vmoe:{prefix}?top_k=2", CPU, image_size=(24, 32))


def test_pixels_of_an_official_model_are_those_of_tensorflow(tmp_path):
    """Half-pixel centres, no antialiasing, values cut off: tf.image.resize and tf.cast."""
    pipeline = TensorFlowResize((21, 34))
    for file in write_jpegs(tmp_path):
        values = np.array(Image.open(file).convert("RGB"), dtype=np.float64)
        exact = nn.functional.interpolate(
            torch.from_numpy(values).permute(2, 0, 1)[None], (21, 34), mode="bilinear"
        )[0]
        pixels = pipeline(read_image(file, 3))
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 21, 34)
        # float32 may lie on the other side of a whole number, where the exact value is near one
        unsure = (exact - exact.round()).abs() < 1e-3
        assert torch.equal(pixels[~unsure], exact.floor()[~unsure].to(torch.uint8))
        assert (pixels.double() - exact)[unsure].abs().max() < 1.001


def test_tensorflows_resize_of_a_small_picture_by_hand():
    """Three pixels of four lie at 1/6, 1.5 and 2 5/6 of them, two at 0.5 and 2.5."""
    row = Image.fromarray(np.array([[0, 10, 20, 31]], dtype=np.uint8))
    found = {}
    for width in (2, 3, 4, 8):
        found[width] = TensorFlowResize((1, width), channels=1)(row)[0, 0].tolist()
    assert found[2] == [5, 25]
    assert found[3] == [1, 15, 29]
    assert found[4] == [0, 10, 20, 31]
    assert found[8] == [0, 2, 7, 12, 17, 22, 28, 31]


@pytest.mark.parametrize("text", ["no", "0", "1", "off", "yes", "none", "2", ""])
def test_a_switch_that_is_neither_true_nor_false_is_refused_by_name(text):
    source = Source("timm:net?on=x", "net", {"on": text}, CPU, None)
    with pytest.raises(CheckpointError, match=f"must have on=true or on=false, got '{text}'"):
        source.switch("on")


def test_switches_are_true_or_false_in_any_letters():
    read = [
        Source("net", "net", query, CPU, None).switch("on")
        for query in ({}, {"on": "true"}, {"on": "True"}, {"on": "FALSE"})
    ]
    assert read == [None, True, True, False]


def test_arguments_of_a_library_have_no_word_that_would_mean_true():
    def arguments(**query):
        return Source("net", "net", query, CPU, None).arguments

    assert arguments(a="true", b="0", c="no_norm", d="1.5") == {
        "a": True, "b": 0, "c": "no_norm", "d": 1.5,
    }  # fmt: skip
    for text in ("no", "Off", "yes", "on"):
        with pytest.raises(CheckpointError, match=f"must have a=true or a=false, got '{text}'"):
            arguments(a=text)
