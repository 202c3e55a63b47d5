"""``ironmoe bench training`` on tiny models: what is counted, what is compared, what is kept."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ironmoe.attacks.training import TRAINING_METHODS
from ironmoe.bench.benchmarks.training import inner, steps
from ironmoe.bench.benchmarks.training.models import new_model
from ironmoe.bench.benchmarks.training.products import count_products
from ironmoe.bench.benchmarks.training.steps import StepSettings, contenders
from ironmoe.bench.cli.app import app
from ironmoe.bench.data.in_memory import load_data
from ironmoe.bench.train.options import takes_steps
from ironmoe.moe import VMoE

EPS = 0.1
STEPS = 3


def tiny(name, data=None, seed=0):
    torch.manual_seed(seed)
    experts = {"moe_layers": (1,), "num_experts": 4, "top_k": 2} if name == "v-moe" else {}
    return VMoE(
        image_size=8,
        patch_size=4,
        channels=1,
        num_classes=10,
        dim=16,
        depth=2,
        heads=2,
        mlp_dim=32,
        **experts,
    )


def fake_torchattacks(monkeypatch):
    """The same attack as torchattacks writes it: mean loss, a start that the seed decides."""

    class Attack:
        def __init__(self, model, eps, alpha, steps, random_start):
            self.model, self.eps, self.alpha, self.steps = model, eps, alpha, steps

        def __call__(self, images, labels):
            training = self.model.training
            self.model.eval()
            point = (images + torch.empty_like(images).uniform_(-self.eps, self.eps)).clamp(0, 1)
            for _ in range(self.steps):
                point.requires_grad_()
                loss = nn.functional.cross_entropy(self.model(point), labels)
                (grad,) = torch.autograd.grad(loss, point)
                delta = (point.detach() + self.alpha * grad.sign() - images).clamp(
                    -self.eps, self.eps
                )
                point = (images + delta).clamp(0, 1).detach()
            self.model.train(training)
            return point

    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(PGD=Attack))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(steps, "PGD_STEPS", (STEPS,))
    monkeypatch.setattr(inner, "new_model", tiny)
    monkeypatch.setitem(sys.modules, "torchattacks", None)


@pytest.mark.parametrize("name", ["v-moe", "vit"])
def test_steps_make_the_same_images_and_cost_what_is_said(small, monkeypatch, name):
    """2n + 3 forward passes where the common loop pays 3n + 3. The outer pass wants no gradient of
    the image, so the first layer costs a little less."""
    fake_torchattacks(monkeypatch)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    model = inner._begun(tiny(name), images, labels)
    found = {one.name: one for one in contenders(model, EPS, None)}
    common = found[f"PGD-{STEPS}, common loop"].adversarial(images, labels)
    assert (common - images).abs().max() == pytest.approx(EPS, abs=1e-6)

    expected = {
        "common loop": (STEPS + 1, STEPS + 1, STEPS + 1),
        "training mode": (STEPS + 1, STEPS + 1, STEPS + 1),
        "ironmoe": (STEPS + 1, STEPS + 1, 1),
        "torchattacks": (STEPS + 1, STEPS + 1, 1),
    }
    for key, products in expected.items():
        one = found[f"PGD-{STEPS}, {key}"]
        made = one.adversarial(images, labels)
        if key != "training mode":
            assert inner._equal_pixels(made, common) == 1.0
        counted = inner._products(one, images, labels)
        assert counted.forward == products[0] and counted.weight == products[2]
        assert products[1] - 0.1 < counted.image <= products[1]
        assert not made.requires_grad if made is not None else key == "training mode"

    free, fgsm = found["Free"], found["FGSM-RS"]
    assert sum(inner._products(fgsm, images, labels)) == pytest.approx(5, abs=0.1)
    assert sum(inner._products(free, images, labels)) == pytest.approx(12) and free.updates == 4


def test_a_step_leaves_the_weights_as_they_are(small):
    """So that every contender does the same work in every round."""
    model = inner._begun(tiny("v-moe"), torch.rand(4, 1, 8, 8), torch.arange(4))
    for one in contenders(model, EPS, None):
        one.step(torch.rand(4, 1, 8, 8), torch.arange(4))
        assert all(map(torch.equal, one.model.state_dict().values(), model.state_dict().values()))
        assert all(weight.grad is not None for weight in one.model.parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_products_of_a_backward_pass_are_told_apart(dtype):
    """A linear layer on rows that are as many as the layer is wide, so that shapes say nothing; and
    a convolution, whose backward pass is one operator."""
    width = 8
    model = nn.Sequential(nn.Conv2d(1, width, 2), nn.Flatten(), nn.Linear(width, width))
    images = torch.rand(width, 1, 2, 2, requires_grad=True)

    def forward():
        with torch.autocast("cpu", enabled=dtype is not None, dtype=dtype):
            return model(images)

    flops = 2 * width * (4 * width + width * width)
    of_images = count_products(model, lambda: torch.autograd.grad(forward().sum(), images))
    assert of_images == (flops, flops, 0)
    assert count_products(model, lambda: forward().sum().backward()) == (flops, flops, flops)
    images.requires_grad_(False)  # the first layer's gradient of the image is not wanted any more
    first = 2 * width * 4 * width
    of_weights = count_products(model, lambda: forward().sum().backward())
    assert of_weights == (flops, flops - first, flops)


@pytest.mark.parametrize("name", TRAINING_METHODS)
def test_a_registered_cost_is_what_is_counted(name):
    """A little less, because the first layer's gradient of the images is not wanted in an outer
    pass, and a penalty on a router does not go through the layers above it."""
    entry, model = TRAINING_METHODS[name], tiny("v-moe")
    nn.init.normal_(model.head.weight)
    options = {"steps": STEPS} if takes_steps(entry) else {}
    method = entry.kind(model, EPS, **options)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)

    def all_updates():
        for update in method.updates(images, labels):
            update.loss.backward()

    one = count_products(model, lambda: model(images)).forward
    counted = sum(count_products(model, all_updates).per(one))
    formula = re.sub(r"(\d)([nm])", r"\1 * \2", entry.cost)
    cost = eval(formula, {"n": STEPS, "m": getattr(method, "replays", None)})
    assert 0.85 * cost < counted <= cost * (1 + 1e-9)


def test_the_settings_of_a_step_reach_the_method():
    settings = StepSettings(0.2, 0.05, 7, torch.bfloat16)
    method = steps.OurPGD("ours", tiny("vit"), settings).method
    assert (method.eps, method.alpha, method.steps) == (0.2, 0.05, 7)
    assert method.inner.autocast_dtype == torch.bfloat16


def test_models_of_one_seed_share_what_they_have_in_common():
    data = load_data("digits")
    dense, sparse = (new_model(name, data, seed=3).state_dict() for name in ("vit", "v-moe"))
    common = [key for key in dense if key in sparse and dense[key].shape == sparse[key].shape]
    assert len(common) > len(dense) / 2 and all(torch.equal(dense[k], sparse[k]) for k in common)
    other = new_model("v-moe", data, seed=4).state_dict()
    assert sum(not torch.equal(sparse[key], other[key]) for key in common) > 5


def run(*arguments, ok=True):
    result = CliRunner().invoke(app, ["bench", "training", *map(str, arguments)])
    assert (result.exit_code == 0) == ok, result.output
    return result.output


def test_rows_say_how_they_came_about_and_are_kept(small, tmp_path):
    options = ["--parts", "inner", "--data", "digits", "--dtypes", "float32", "--models", "v-moe"]
    options += ["--folder", tmp_path / "kept"]
    output = run(*options, "--runs", 1, "--out", tmp_path / "rows.json")
    assert "Steps of 1 model to measure, in about" in output
    assert f"PGD-{STEPS}" in output and "not measured: torchattacks" in output
    (entry,) = json.loads((tmp_path / "rows.json").read_text())["inner"]
    assert {"settings", "made", "rows"} == entry.keys() and entry["made"]["machine"]["threads"]
    ours = {row["step"]: row for row in entry["rows"]}[f"PGD-{STEPS}, ironmoe"]
    assert ours["equal_pixels"] == 1 and ours["ms"] > 0 and ours["runs"] == 1
    assert ours["limit"] == pytest.approx((3 * STEPS + 3) / (2 * STEPS + 3), abs=0.02)

    assert "| V-MoE | float32 | PGD-3, ironmoe | 100.00 % |" in (
        next((tmp_path / "kept").glob("inner-*/table.md")).read_text()
    )
    for change in ({"ms": 1e9}, {"p80": None}, {"runs": "x"}):
        assert not inner.are_whole([entry["rows"][0] | change])
    assert inner.are_whole(entry["rows"]) and not inner.are_whole([])
    again = run(*options, "--runs", 1)
    assert "measured before" in again and "to measure" not in again
    assert "other settings (runs: 1 there, 2 now)" in run(*options, "--runs", 2, ok=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "outer"], "--parts must be among"),
        (["--models", "v-moe,cnn"], "--models must be among"),
        (["--dtypes", "float16"], "--dtypes must be among"),
        (
            ["--parts", "methods", "--methods", "alternating", "--models", "vit"],
            "--methods alternating need a model with experts, got --models vit",
        ),
        (["--runs", 0], "runs"),
    ],
)
def test_bad_options_are_named(options, message):
    assert message in run(*options, ok=False)
