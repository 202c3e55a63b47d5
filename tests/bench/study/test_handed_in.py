"""Models that a user hands in: they are measured, paired and judged, and what cannot be measured of
them is said."""

import dataclasses
import sys

import pytest
import torch
from small_study import QUIET, checkpoint, options, report

from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.study.report.figures.parts.groups import at_equal_cost
from ironmoe.bench.study.report.gather import study_facts
from ironmoe.bench.study.run import run_study
from ironmoe.bench.study.work.collected import Collected
from ironmoe.bench.study.work.handed_in import handed_in, read_option
from ironmoe.bench.study.work.plan import announcement, make_plan
from ironmoe.bench.study.work.tasks import Study
from ironmoe.moe import CheckpointError

pytestmark = pytest.mark.usefixtures("no_figures")


def test_models_of_ones_own_are_measured_and_paired(few, tmp_path):
    moe = {"moe_layers": [1], "num_experts": 4, "top_k": 2, "expert_dim": 15}
    texts = []
    for seed in range(3):
        for name, changes in (("dense", {}), ("moe", moe)):
            file = tmp_path / f"{name}{seed}.safetensors"
            checkpoint(file, seed, **changes)
            texts.append(f"{name}@{seed}={file}")
    entries, data = handed_in(tuple(texts), few)
    assert [(e.arm.name, e.arm.experts, e.arm.top_k, e.seed) for e in entries[:2]] == [
        ("dense", 0, 0, 0),
        ("moe", 4, 2, 0),
    ]
    assert not entries[1].arm.equal_width and torch.equal(data.labels, few.labels)

    study = options(few, tmp_path / "own", models=tuple(texts), measurements=("clean", "curve"))
    run_study(study, QUIET)
    found = report(tmp_path / "own")
    assert len(found["runs"]) == 6 and {run["training"] for run in found["runs"]} == {
        "as handed in"
    }
    judged = {verdict["claim"]: verdict for verdict in found["verdicts"]}
    assert judged["equal cost"]["runs"] == 3


MODELS = """
import torch
from ironmoe.moe import CheckpointError, VMoE

class Scaled(torch.nn.Module):
    def __init__(self, scale, how=None):
        super().__init__()
        torch.manual_seed(0)
        self.inner = VMoE(8, 4, 16, 2, 2, 32, 3, moe_layers=[1], num_experts=4, channels=1)
        torch.nn.init.normal_(self.inner.head.weight)
        self.scale, self.how = [scale], how
    def forward(self, x):
        if self.how == "raises":
            raise KeyError("no such thing")
        logits = self.scale[0] * self.inner(x)
        if self.how == "detached":
            return logits.detach()
        return logits * float("nan") if self.how == "nan" else logits

plus, minus = (lambda: Scaled(1.0)), (lambda: Scaled(-1.0))
raises, detached, nan = (lambda how=how: Scaled(1.0, how) for how in ("raises", "detached", "nan"))
"""


@pytest.fixture
def models_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "models_of_ones_own.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("models_of_ones_own", None)


def own(few, tmp_path, names, measurements=("clean",)):
    texts = tuple(f"{name}@{seed}=models_of_ones_own:{name}" for seed, name in enumerate(names))
    asked = options(few, tmp_path / "own", models=texts, measurements=measurements)
    run_study(asked, QUIET)
    return report(tmp_path / "own")


@pytest.mark.usefixtures("models_of_ones_own")
def test_models_that_only_their_code_tells_apart_are_both_measured(few, tmp_path):
    found = own(few, tmp_path, ["plus", "minus"])
    one, other = (run["values"] for run in found["runs"])
    assert one["clean loss"] != other["clean loss"]


@pytest.mark.usefixtures("models_of_ones_own")
def test_a_model_without_a_gradient_is_a_problem_of_its_own(few, tmp_path):
    found = own(few, tmp_path, ["plus", "detached"], ("clean", "derivative"))
    fine, detached = (run["values"] for run in found["runs"])
    assert "r1" in fine and "r1" not in detached and "clean" in detached
    (problem,) = found["problems"]
    assert "derivative of detached" in problem


@pytest.mark.parametrize(
    ("name", "message"),
    [("raises", "raises cannot take images"), ("nan", "nan@0 must give .* not finite")],
)
@pytest.mark.usefixtures("models_of_ones_own")
def test_a_model_that_gives_no_logits_is_refused(few, tmp_path, name, message):
    with pytest.raises((UserError, CheckpointError), match=message):
        own(few, tmp_path, [name])


def test_test_images_are_those_of_the_data_whatever_numbers_classes_have(few, tmp_path):
    """A model that counts its classes backwards is asked about the same images."""
    study = Study(options(few, tmp_path), tmp_path)
    images, labels = study._test_images()
    study.data = dataclasses.replace(few, labels=2 - few.labels)
    again, other = study._test_images()
    assert torch.equal(again, images) and torch.equal(other, 2 - labels)


def test_a_model_of_other_flops_is_no_part_of_equal_cost(few, tmp_path):
    checkpoint(tmp_path / "dense.safetensors")
    checkpoint(tmp_path / "wide.safetensors", moe_layers=[1], num_experts=4, top_k=2)
    texts = tuple(f"{name}={tmp_path}/{name}.safetensors" for name in ("dense", "wide"))
    (_, wide), _ = handed_in(texts, few)
    assert wide.arm.equal_width and wide.seed == 0


def test_a_refused_model_leaves_no_folder_behind(few, tmp_path):
    checkpoint(tmp_path / "a.safetensors")
    for bad in (f"x={tmp_path}/none.safetensors", f"x={tmp_path}/a.safetensors"):
        asked = options(few, tmp_path / "own", models=(bad,), measurements=("clean",))
        if "none" in bad:
            with pytest.raises(CheckpointError):
                run_study(asked, QUIET)
        else:
            run_study(asked, QUIET)


def test_a_dense_model_of_other_flops_is_compared_with_nothing_at_equal_cost(few, tmp_path):
    checkpoint(tmp_path / "vit.safetensors")
    checkpoint(tmp_path / "small.safetensors", mlp_dim=8)
    texts = tuple(f"{name}={tmp_path}/{name}.safetensors" for name in ("vit", "small"))
    (vit, small), _ = handed_in(texts, few)
    assert not vit.arm.equal_width and small.arm.equal_width
    assert [group.arms for group in at_equal_cost([vit.arm, small.arm])] == [[vit.arm]]


def test_what_cannot_be_measured_of_a_model_is_said(few, tmp_path):
    """Images of this model influence each other, so that it has no first-order radius."""
    program = (
        "import torch\nfrom ironmoe.moe import Capacity, VMoE\n"
        "def coupled():\n"
        "    torch.manual_seed(0)\n"
        "    model = VMoE(8, 4, 16, 2, 2, 32, 3, moe_layers=[1], num_experts=4, channels=1,\n"
        "                 capacity=Capacity(1.0, images_per_group=2))\n"
        "    torch.nn.init.normal_(model.head.weight)\n"
        "    return model"
    )
    (tmp_path / "coupled_model.py").write_text(program)
    sys.path.insert(0, str(tmp_path))
    try:
        asked = options(
            few,
            tmp_path / "own",
            models=("moe=coupled_model:coupled",),
            measurements=("clean", "derivative"),
        )
        run_study(asked, QUIET)
    finally:
        sys.path.remove(str(tmp_path))
    found = report(tmp_path / "own")
    assert "clean" in found["runs"][0]["values"] and "r1" not in found["runs"][0]["values"]
    (problem,) = found["problems"]
    assert "derivative of moe, as handed in, seed 0: " in problem and "influence" in problem


def test_trainings_of_handed_in_models_are_kept_apart(few, tmp_path):
    checkpoint(tmp_path / "a.safetensors")
    texts = tuple(f"x@1{end}={tmp_path}/a.safetensors" for end in ("", "/pgd-at", "/of ours"))
    entries, _ = handed_in(texts, few)
    assert [entry.training for entry in entries] == ["as handed in", "pgd-at", "of ours"]
    assert {entry.seed for entry in entries} == {1} and len({e.slug for e in entries}) == 3
    with pytest.raises(UserError, match="once, got x@1/pgd-at twice"):
        handed_in((texts[1], texts[1]), few)


@pytest.mark.parametrize(
    "text", ["x", "=file", "name=", "name@=file", "name@one=file", "name@1/=file"]
)
def test_bad_options_for_a_model_are_refused(text):
    with pytest.raises(UserError, match="must be NAME@SEED=MODEL or NAME@SEED/TRAINING=MODEL"):
        read_option(text)


def test_models_that_cannot_be_told_apart_are_refused(few, tmp_path):
    checkpoint(tmp_path / "a.safetensors")
    checkpoint(tmp_path / "b.safetensors", moe_layers=[1], num_experts=4)
    a, b = (f"{tmp_path}/{name}.safetensors" for name in "ab")
    with pytest.raises(UserError, match="once, got x@0 twice"):
        handed_in((f"x@0={a}", f"x={a}"), few)
    with pytest.raises(UserError, match="must be of the same architecture"):
        handed_in((f"x@0={a}", f"x@1={b}"), few)


def test_classes_that_were_guessed_are_said(few, tmp_path):
    checkpoint(tmp_path / "a.safetensors")
    texts = (f"x@0={tmp_path}/a.safetensors",)
    strange = dataclasses.replace(few, classes=[f"strange {name}" for name in few.classes])
    study = Study(options(strange, tmp_path / "own", models=texts), tmp_path / "own")
    (guess,) = study.guesses
    assert "matched by number, which is a guess" in guess and guess in study.data.notes
    assert guess in announcement(study, make_plan(study))
    assert study_facts(study, Collected([], [], 0.0)).notes == (guess,)
    assert Study(options(few, tmp_path / "own", models=texts), tmp_path / "own").guesses == []
