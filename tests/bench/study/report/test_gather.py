"""What the page says of models, data and time is counted in the study."""

import pytest
import torch

from ironmoe.bench.common.checkpoints import count_flops, save_weights
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.study.ladder.arms import LADDER, Size, arguments
from ironmoe.bench.study.ladder.initial import new_model
from ironmoe.bench.study.ladder.training import TrainingSettings
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.options import StudyOptions
from ironmoe.bench.study.report.gather import study_facts
from ironmoe.bench.study.work.collected import Collected
from ironmoe.bench.study.work.tasks import Study

SIZE = Size(dim=16, depth=2, heads=2, mlp_dim=32, moe_blocks=1)


@pytest.fixture
def study(tmp_path):
    """Of two arms and two seeds. Three of the models are there; nobody trained them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 8, 8, generator=generator)
    data = ImageData("few", images, torch.arange(60) % 3, list("abc"), [])
    options = StudyOptions(
        data,
        arms=("dense", "E4"),
        trainings=("standard",),
        seeds=2,
        training=TrainingSettings(size=SIZE),
        budget=Budget(images=8),
        measurements=("clean", "expert use"),
        processes=3,
        out=tmp_path,
    )
    found = Study(options, tmp_path)
    (tmp_path / "models").mkdir()
    for task in found.tasks[:3]:
        arm = task.entry.arm
        model = new_model(arm, (1, 8, 8), 3, SIZE, task.entry.seed)
        noticed = ["it collapsed"] if task.entry.name == "E4, standard, seed 0" else []
        extra = {"seconds": 2.5, "training": {"warnings": noticed}}
        built_from = arguments(arm, (1, 8, 8), 3, SIZE)
        task.entry.file.write_bytes(save_weights(model.state_dict(), built_from, extra))
    return found


def test_facts_are_counted_in_the_models_that_are_there(study):
    kept = Collected([], ["swaps of mine: no"], 12.0)
    facts = study_facts(study, kept, command="ironmoe study")
    assert [each.arm.name for each in facts.arms] == ["dense", "E4"]
    for each in facts.arms:
        model = new_model(LADDER[each.arm.name], (1, 8, 8), 3, SIZE, 0)
        assert each.flops == count_flops(model, (1, 8, 8))
        assert each.parameters == sum(weights.numel() for weights in model.parameters())
    assert (facts.training_seconds, facts.measuring_seconds, facts.processes) == (7.5, 12.0, 3)
    assert facts.notes == ("E4, standard, seed 0: it collapsed",)
    assert facts.problems == ("swaps of mine: no",) and facts.command == "ironmoe study"
    assert (facts.data, facts.classes, facts.test_images) == ("few", 3, len(study.images))
    assert [what.name for what in facts.measurements] == ["clean", "expert use"]
    assert "curve" in facts.not_asked and "clean" not in facts.not_asked
    assert facts.budgets == {"standard": Budget(images=8)}
    assert facts.training["size"]["dim"] == 16 and facts.checksum == study.data.checksum


def test_nothing_is_trained_for_the_facts(study):
    study_facts(study, Collected([], [], 0.0))
    assert not study.tasks[3].entry.is_trained


def test_an_arm_of_which_no_model_is_there_has_no_facts(study):
    for task in study.tasks:
        if task.entry.arm.name == "E4" and task.entry.is_trained:
            task.entry.file.unlink()
    facts = study_facts(study, Collected([], [], 0.0))
    assert [each.arm.name for each in facts.arms] == ["dense"] and facts.of_arm("E4") is None
