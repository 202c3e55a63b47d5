"""The parts of ``ironmoe train``: rows, batches in parts, schedules that go on, the choice of
weights."""

import copy
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from ironmoe.attacks.training import EMA, PGDAT, TRADES, Free, Standard
from ironmoe.bench.common.loop.schedules import one_cycle, warmup_and_cosine
from ironmoe.bench.common.processes import Processes
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.train.blocks import checkpoint_blocks
from ironmoe.bench.train.display import Display
from ironmoe.bench.train.held_out import HeldOut, HeldOutRows
from ironmoe.bench.train.making import make_method
from ironmoe.bench.train.recipe import MethodChoice, TrainRecipe
from ironmoe.bench.train.rows import split
from ironmoe.bench.train.trainer import TrainedOn, Trainer
from ironmoe.bench.train.updates import Updates, mixed_seed
from ironmoe.bench.train.watch import Watch
from ironmoe.moe import VMoE, routing_sites


def data(counts):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    names = [str(label) for label in range(len(counts))]
    return ImageData("some", torch.rand(len(labels), 1, 4, 4), labels, names, [])


def moe(**options):
    torch.manual_seed(0)
    return VMoE(
        8, 4, 16, 2, 2, 16, 4, (0, 1), 4, channels=1, classifier="gap", **options
    )  # fmt: skip


def batch(count=12):
    generator = torch.Generator().manual_seed(1)
    images = 0.2 + 0.6 * torch.rand(count, 1, 8, 8, generator=generator)
    return images, torch.arange(count) % 4


def updates(model, method, **recipe):
    recipe = TrainRecipe(batch_size=12, **recipe)
    return Updates(model, method, recipe, seed=0, steps=10, group=Processes())


def test_weights_are_moved_once_eps_has_grown():
    """Moved from the first batch on, those of a new V-MoE learnt nothing."""
    method, _ = make_method(MethodChoice(awp=0.01), TrainRecipe(), moe(), batches=10)
    assert method.warmup_steps == method.ramp_steps == 5


def test_held_out_rows_are_a_tenth_of_each_class_of_the_training_rows():
    some = data([50, 100, 2, 3])
    rows = split(some)
    training, test = some.split()
    assert not set(rows.held_out.tolist()) & (set(rows.trained.tolist()) | set(test.tolist()))
    assert set(rows.held_out.tolist()) | set(rows.trained.tolist()) == set(training.tolist())
    assert some.labels[rows.held_out].bincount(minlength=4).tolist() == [4, 8, 0, 1]
    assert some.labels[rows.trained].bincount(minlength=4).min() > 0


@pytest.mark.parametrize("kind", [Standard, PGDAT, TRADES])
def test_a_batch_in_parts_is_the_mean_of_the_losses_of_its_parts(kind):
    """Without random starts, noise and balance losses, which belong to a part, the parts of a batch
    make the step of the whole batch."""
    after = {}
    for parts in (1, 3):
        model = moe(
            router={"noise_std": 0.0, "importance_weight": 0.0, "load_weight": 0.0}
        ).double()
        nn.init.normal_(model.head.weight, std=0.1)
        options = {"start": "clean"} if kind is PGDAT else {}
        method = kind(model, 0.1, steps=1, **options)
        if kind is TRADES:
            method._attack = lambda images, labels, strength: images + 0.05
        made = updates(model, method, parts=parts)
        images, labels = batch()
        progress = made.make(images.double(), labels, 0)
        after[parts] = progress, copy.deepcopy(model.state_dict())

    assert after[1][0].loss == pytest.approx(after[3][0].loss, rel=1e-6)
    for name, weight in after[1][1].items():
        torch.testing.assert_close(after[3][1][name], weight, rtol=0, atol=1e-8)


def test_random_numbers_depend_on_the_part_and_not_on_what_ran_before():
    losses = []
    for before in (0, 1000):
        model = moe()
        made = updates(model, PGDAT(model, 0.1, steps=1), parts=2)
        torch.manual_seed(before)
        losses.append(made.make(*batch(), 3).loss)
    assert losses[0] == losses[1]
    assert len({mixed_seed(0, 1, 2), mixed_seed(0, 12), mixed_seed(1, 0, 2)}) == 3


def test_checkpointed_blocks_give_the_same_step_with_router_noise():
    after = []
    for checkpointing in (False, True):
        model = moe(router={"noise_std": 1.0})
        if checkpointing:
            checkpoint_blocks(model)
        names = list(routing_sites(model))
        made = updates(model, PGDAT(model, 0.1, steps=1))
        made.make(*batch(), 0)
        after.append((names, model.state_dict()))
    assert after[0][0] == after[1][0] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert after[0][1].keys() == after[1][1].keys()
    assert all(torch.equal(after[0][1][name], after[1][1][name]) for name in after[0][1])


@pytest.mark.parametrize("schedule", [one_cycle(0.2), warmup_and_cosine(0.1)])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_a_schedule_that_begins_in_the_middle_has_the_same_rates(schedule, steps, recwarn):
    def rates(first):
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.1)
        set_rates = schedule(optimizer, steps)
        seen = []
        for step in range(first, steps):
            set_rates(step)
            (group,) = optimizer.param_groups
            seen.append((group["lr"], group["betas"]))
            optimizer.step()
        return seen

    whole = rates(0)
    assert rates(steps // 2) == whole[steps // 2 :]
    assert max(rate for rate, _ in whole) <= 0.1 and not recwarn.list


def test_what_is_left_of_an_epoch_is_a_batch_if_every_part_gets_two_images():
    recipe = TrainRecipe(batch_size=10, parts=2)
    assert [recipe.steps_of_epoch(images) for images in (20, 23, 24, 25)] == [2, 2, 3, 3]


def in_turn(*shares):
    """Stands for the measurement after each epoch: (clean, robust) that are known before."""
    left = list(shares)
    return lambda model: HeldOut(*left.pop(0), {})


class Guard:
    """Trips after the given number of epochs."""

    images = torch.zeros(2)

    def __init__(self, epochs):
        self.last = torch.ones(epochs, dtype=torch.bool)

    def check(self):
        self.last = self.last[1:]
        return SimpleNamespace(
            tripped=not len(self.last), message="overfits", fgsm=0.9, pgd=0.1, alignment=0.0
        )

    def state_dict(self):
        return {"last_pgd": self.last, "good.weight": torch.zeros(1)}

    def load_state_dict(self, state):
        self.last = state["last_pgd"]


def trainer(measure, folder, *, epochs, guard=None, by="robust", ema=None):
    model = moe()
    images, labels = batch()
    return Trainer(
        model,
        Standard(model),
        TrainRecipe(epochs=epochs, batch_size=6, shifts=False, ema=ema),
        TrainedOn(images, labels),
        SimpleNamespace(measure=measure),
        seed=0,
        by=by,
        group=Processes(),
        state_file=folder / "state",
        watch=Watch(guard),
    )


def run(trainer, epochs):
    return trainer.run(
        Display(Console(quiet=True), epochs=epochs, batches=trainer.batches, trained_on="accuracy")
    )


@pytest.mark.parametrize("by, chosen", [("robust", 3), ("clean", 1)])
def test_the_weights_of_the_best_epoch_are_kept_and_ties_go_to_the_later_one(tmp_path, by, chosen):
    shares = [(0.8, 0.3), (0.7, 0.4), (0.7, 0.4), (0.6, 0.4)]
    seen = []

    def measure(model):
        seen.append(copy.deepcopy(model.state_dict()))
        return HeldOut(*shares[len(seen) - 1], {})

    trained = run(trainer(measure, tmp_path, epochs=4, by=by), 4)
    assert trained.chosen == chosen
    expected = seen[chosen - 1]
    assert all(torch.equal(trained.weights[name], expected[name]) for name in expected)


def test_weights_that_have_learned_nothing_are_not_chosen_for_their_robustness(tmp_path):
    """One class for every image is right for a tenth of them, under any attack."""
    shares = [(0.1, 0.1, False), (0.8, 0.05, True), (0.8, 0.04, True)]
    epochs = iter([(clean, robust, {}, 0.1, learned) for clean, robust, learned in shares])
    trained = run(trainer(lambda model: HeldOut(*next(epochs)), tmp_path, epochs=3), 3)
    assert trained.chosen == 2


def test_one_class_for_every_image_is_no_learning():
    labels = torch.arange(100) % 4
    rows = {"eps": 0.1, "norm": "Linf", "dtype": None, "together": 50}
    images = labels[:, None, None, None] / 4 + torch.zeros(100, 1, 2, 2)

    def one_class(x):
        return torch.eye(4)[torch.zeros(len(x), dtype=int)] + 0 * x.mean((1, 2, 3))[:, None]

    def right(x):
        return -(x.mean((1, 2, 3))[:, None] - torch.arange(4) / 4).abs()

    for function, learned in ((one_class, False), (right, True)):
        model = nn.Module()
        model.forward = function
        found = HeldOutRows(images, labels, **rows).measure(model)
        assert (found.chance, found.learned) == (0.25, learned)


def test_with_averages_the_averaged_weights_are_measured_and_chosen(tmp_path):
    made = trainer(in_turn((0.5, 0.5)), tmp_path, epochs=1, ema=0.5)
    trained = run(made, 1)
    with made.average.applied() as model:
        averaged = copy.deepcopy(model.state_dict())
    assert all(torch.equal(trained.weights[name], averaged[name]) for name in averaged)
    assert not torch.equal(trained.weights["head.weight"], made.model.head.weight)


def test_a_guard_that_trips_stops_the_training_and_an_earlier_epoch_is_chosen(tmp_path):
    measure = in_turn((0.8, 0.3), (0.7, 0.4), (0.9, 0.9))
    trained = run(trainer(measure, tmp_path, epochs=4, guard=Guard(3)), 4)
    assert (
        trained.chosen == 2
        and len(trained.curves) == 3
        and trained.warnings == ["Training was stopped: overfits"]
    )
    again = run(trainer(in_turn(), tmp_path, epochs=4, guard=Guard(3)), 4)
    assert again.curves == trained.curves and again.warnings == trained.warnings


def test_weights_are_averaged_after_each_step_of_an_optimizer(tmp_path):
    model = moe()
    made = updates(model, Free(model, 0.1, replays=3), parts=2)
    average = EMA(model, 0.9)
    made.make(*batch(), 0, average.update)
    assert average.updates == 3


def test_running_statistics_see_a_checkpointed_batch_once():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            momenta = (0.1, None)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64, momentum=m)) for m in momenta
            )
            self.head = nn.Linear(64, 4)

        def forward(self, x):
            x = x.flatten(1)
            for block in self.blocks:
                x = block(x).relu()
            return self.head(x)

    after = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Blocks().train()
        if checkpointing:
            checkpoint_blocks(model)
        made = updates(model, PGDAT(model, 0.1, steps=1))
        for step in range(2):
            made.make(*batch(), step)
        after.append(model.state_dict())
        assert [block[1].momentum for block in model.blocks] == [0.1, None]
    assert after[0]["blocks.1.1.num_batches_tracked"] == 2
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def test_large_data_hold_out_some_hundred_images():
    rows = split(data([6000, 9000]))
    assert len(rows.held_out) == 200 and len(rows.trained) == 12000 - 400


def test_the_layer_of_a_loss_that_is_not_finite_is_looked_for_as_the_model_trains():
    """An overflow of float16 that float32 does not have."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 4))
    nn.init.constant_(model[1].weight, 3e4)
    images, _ = batch()
    assert PGDAT(model, 0.1, autocast_dtype=torch.float16).non_finite_layer(images) == "1"
    assert PGDAT(model, 0.1).non_finite_layer(images) == ""
