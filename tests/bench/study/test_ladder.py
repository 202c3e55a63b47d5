"""The models of the study: equal compute is counted, and models of a seed are paired."""

import numpy as np
import pytest
import torch
from rich.console import Console

from ironmoe.bench.common.checkpoints import count_flops, load_checkpoint
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.data.in_memory import load_data
from ironmoe.bench.study.ladder import training
from ironmoe.bench.study.ladder.arms import DENSE, LADDER, Arm, Size, arguments
from ironmoe.bench.study.ladder.initial import new_model
from ironmoe.bench.study.ladder.training import ModelRun, TrainingSettings, train_model

QUIET = Console(quiet=True)
TINY = Size(dim=16, depth=2, heads=2, mlp_dim=32, moe_blocks=1)


def model(arm, seed=0, shape=(1, 28, 28)):
    return new_model(LADDER[arm], shape, 10, Size(), seed)


def test_the_ladder_has_every_arm_once():
    experts = {"E2", "E4", "E8", "E16", "E32", "E4-renorm", "E8-renorm", "E16-renorm", "E32-renorm"}
    kinds = {f"E8-{k}{wide}" for k in ("K1", "K4") for wide in ("", "-wide")}
    assert set(LADDER) == {DENSE} | experts | kinds | {f"{kind}-renorm" for kind in kinds}
    assert all(name == arm.name for name, arm in LADDER.items())


@pytest.mark.filterwarnings("error")
def test_equal_flops_are_counted_and_within_one_percent():
    shape = (1, 28, 28)
    flops = {arm: count_flops(model(arm), shape) for arm in LADDER}
    for arm in LADDER.values():
        if not arm.equal_width:
            assert flops[arm.name] == pytest.approx(flops[DENSE], rel=0.01), arm.name
    assert flops["E8-K1-wide"] < 0.9 * flops["E8"] < 0.8 * flops["E8-K4-wide"]


def test_equal_flops_hold_for_other_images():
    shape = (3, 32, 32)
    dense, most = (count_flops(model(arm, shape=shape), shape) for arm in (DENSE, "E32"))
    assert most == pytest.approx(dense, rel=0.01)


def test_equal_width_means_the_experts_of_the_base_arm():
    width = model("E8").blocks[-1].mlp.fc1.out_features
    for arm in ("E8-K1-wide", "E8-K4-wide", "E8-K4-wide-renorm"):
        assert model(arm).blocks[-1].mlp.fc1.out_features == width
    assert model("E8-K1").blocks[-1].mlp.fc1.out_features > width


def test_what_arms_share_begins_alike_and_nothing_else_does():
    dense, other_seed = model(DENSE).state_dict(), model(DENSE, seed=1).state_dict()
    random = [key for key, value in dense.items() if value.unique().numel() > 1]
    assert len(random) > 8 and not any(torch.equal(dense[key], other_seed[key]) for key in random)
    for arm in LADDER:
        weights = model(arm).state_dict()
        shared = [key for key in dense if key in weights and ".mlp." not in key]
        assert len(shared) > 20
        assert all(torch.equal(weights[key], dense[key]) for key in shared), arm
        first = "blocks.0.mlp.fc1.weight"  # of the one dense MLP that every arm has
        assert torch.equal(weights[first], dense[first])


def test_arms_that_differ_in_gates_alone_begin_with_the_same_experts():
    source, renormalized = model("E8"), model("E8-renorm")
    assert renormalized.blocks[-1].mlp.router.renormalize
    for key, value in source.state_dict().items():
        assert torch.equal(value, renormalized.state_dict()[key])


def test_a_new_model_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model("E32")
    assert torch.equal(torch.get_rng_state(), before)


def test_experts_without_width_are_refused():
    with pytest.raises(UserError, match=r"mlp_dim must be more than .*'E32', got 16"):
        arguments(LADDER["E32"], (1, 28, 28), 10, Size(mlp_dim=16))
    assert Arm("dense").is_dense


@pytest.fixture
def digits(monkeypatch):
    data = load_data("digits")
    few = np.concatenate([np.flatnonzero(data.labels == label)[:25] for label in range(3)])
    return data.__class__("few", data.images[few], data.labels[few], list("012"), [])


def test_a_finished_training_is_a_checkpoint_and_is_not_done_again(digits, tmp_path, monkeypatch):
    settings = TrainingSettings(size=TINY, epochs=1, batch_size=20)
    run = ModelRun("E4", "pgd-at", 0)
    file = train_model(run, digits, settings, tmp_path, QUIET)
    trained, extra = load_checkpoint(file, torch.device("cpu"))
    assert extra["run"] == run._asdict() and extra["classes"] == digits.classes
    assert extra["training"]["chosen_epoch"] == 1
    assert trained(digits.images[:2]).shape == (2, 3)
    assert list(tmp_path.iterdir()) == [file]  # the state is gone

    monkeypatch.setattr(training, "train_for_study", None)  # called, it would fail
    assert train_model(run, digits, settings, tmp_path, QUIET) == file


def test_adversarial_training_attacks_and_standard_training_does_not(digits, tmp_path):
    settings = TrainingSettings(size=TINY, epochs=1, batch_size=20)
    robust, standard = (settings.choice(name) for name in ("pgd-at", "standard"))
    assert (robust.eps_255, robust.steps, robust.alpha_255) == (25.5, 4, 12.75)
    assert standard.name == "standard" and standard.eps_255 == 25.5
    files = [
        train_model(ModelRun("dense", name, 0), digits, settings, tmp_path, QUIET)
        for name in ("standard", "pgd-at")
    ]
    weights = [load_checkpoint(file, torch.device("cpu"))[0].head.weight for file in files]
    assert not torch.equal(*weights)
