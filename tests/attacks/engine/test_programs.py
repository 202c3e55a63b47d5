"""Models that torch has made into programs: scripted, traced, frozen and exported ones."""

import pytest
import torch
from torch import nn

from ironmoe.attacks import PGD, Square, evaluate

EPS = 0.1
BATCH = torch.export.Dim("batch", min=1, max=1024)


@pytest.fixture(scope="module")
def images():
    return torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def eager():
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)
    return nn.Sequential(*layers).eval()


def exported(model, images):
    return torch.export.export(model, (images,), dynamic_shapes=({0: BATCH},)).module()


PROGRAMS = {
    "scripted": lambda model, images: torch.jit.script(model),
    "traced": torch.jit.trace,
    "frozen": lambda model, images: torch.jit.freeze(torch.jit.script(model)),
    "optimised": lambda model, images: torch.jit.optimize_for_inference(torch.jit.script(model)),
    "exported": exported,
    "part of a model": lambda model, images: nn.Sequential(
        nn.Dropout(0.9), exported(model, images)
    ),
    "frozen part": lambda model, images: nn.Sequential(
        nn.Dropout(0.9), torch.jit.freeze(torch.jit.script(model))
    ),
    "symbolic": lambda model, images: torch.fx.symbolic_trace(model),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_is_attacked_like_the_model_it_was_made_of(eager, images, kind):
    program = PROGRAMS[kind](eager, images)
    labels = eager(images).argmax(1)
    flags = {part: part.training for part in program.modules() if hasattr(part, "training")}
    for attack in (PGD, Square):
        expected = attack(eager, EPS, steps=5).run(images, labels)
        report = evaluate(program, (images, labels), {"a": attack(program, EPS, steps=5)})
        assert torch.equal(report.attacks["a"].fell, expected.success)
        assert not {"randomised model", "quantised input"} & {
            flag.name for flag in report.checks if flag.tripped
        }
    assert all(part.training == flag for part, flag in flags.items())
