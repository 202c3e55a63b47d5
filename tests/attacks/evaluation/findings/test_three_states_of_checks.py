"""A check that could not be made has neither passed nor tripped, and says why."""

import pytest
import torch
import toys

from ironmoe.attacks import PGD, DeepFool, HopSkipJump, Square, check_model, evaluate
from ironmoe.attacks.evaluation.checks.model_checks import MODEL_CHECKS
from ironmoe.attacks.evaluation.findings.flag import Flag, combined, counted_states

GRADIENT = {"quantised input", "zero gradients", "routing gradient blocked"}


@pytest.fixture(scope="module")
def data():
    return toys.blobs(40)


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(*data).float()


def states(flags):
    return {flag.name: flag.state for flag in flags}


def unseen(flags):
    return {flag.name for flag in flags if flag.state == "not looked at"}


def test_a_flag_is_in_one_state_and_its_value_counts_only_if_it_was_looked_at():
    flags = [
        Flag("a", False, 0.5, "."),
        Flag("b", True, 0.5, "."),
        Flag.not_looked_at("c", "it rains"),
    ]
    assert [flag.state for flag in flags] == ["passed", "tripped", "not looked at"]
    assert [flag.as_dict()["value"] for flag in flags] == [0.5, 0.5, None]
    assert not flags[2].tripped and flags[2].message == "Not looked at: it rains."
    said = "1 of 3 checks tripped, 1 passed, 1 was not looked at"
    assert counted_states(flags) == said
    assert counted_states([]) == "checks against false security were not made"


def test_what_trips_in_one_replica_trips_although_others_could_look_at_more():
    """As a random model: where it was found random, fewer checks could be made."""
    unseen_here = Flag.not_looked_at("quantised input", "the model is random, or of half precision")
    here = [Flag("randomised model", True, 0.1, "drawn"), unseen_here]
    there = [
        Flag("randomised model", False, 0.0, "steady"),
        Flag("quantised input", False, 0.1, "."),
    ]
    for of_replicas in ([here, there], [there, [], here]):
        assert combined(of_replicas) == [here[0], there[1]]
    assert combined([[], here]) == here and combined([[], []]) == []


def test_without_room_for_a_look_no_check_of_the_model_has_passed(model, data):
    report = evaluate(model, data, {"it": PGD(model, 0.1, steps=2)}, max_forwards=100)
    assert unseen(report.checks) >= {*MODEL_CHECKS}
    assert "max_forwards left no room" in report.checks[0].message


def test_without_an_image_that_can_be_judged_no_check_of_the_model_has_passed(data):
    def nowhere(images):
        return torch.full((len(images), 4), float("nan")) + images.sum((1, 2, 3))[:, None]

    attack = PGD(nowhere, 0.1, steps=2)
    report = evaluate(nowhere, data, {"it": attack}, on_bad="skip")
    assert unseen(report.checks) >= {*MODEL_CHECKS}
    assert states(report.checks)["nothing to attack"] == "tripped"


def test_checks_list_the_same_names_for_every_kind_of_output(model, data):
    def whole(images):
        return model(images).argmax(1)

    names = [flag.name for flag in check_model(Square(whole, 0.1), *data)]
    assert sorted(names) == sorted(MODEL_CHECKS)
    found = unseen(check_model(Square(whole, 0.1), *data))
    assert found == GRADIENT | {"softmax outputs", "fewer classes than the loss needs"}
    assert sorted(flag.name for flag in check_model(PGD(model, 0.1), *data)) == sorted(MODEL_CHECKS)


def test_a_model_that_is_always_wrong_was_not_asked_for_its_gradient_at_right_images(model, data):
    wrong = (model(data[0]).argmax(1) + 1) % 4
    assert "zero gradients" in unseen(check_model(PGD(model, 0.1), data[0], wrong))


def test_a_random_model_is_not_looked_at_for_rounding_or_for_a_second_answer(model, data):
    def random(images):
        return model(images) + 0.5 * torch.randn(len(images), 4)

    found = evaluate(random, data, {"it": PGD(random, 0.1, steps=2)})
    assert states(found.checks)["randomised model"] == "tripped"
    assert unseen(found.checks) >= {
        "forward non-determinism", "quantised input", "two answers to one image"
    }  # fmt: skip


def test_attacks_without_gradients_say_nothing_of_gradients(model, data):
    flags = evaluate(model, data, {"it": Square(model, 0.02, steps=5)}).checks
    assert unseen(flags) >= {"attacks without a gradient", "loss still rising at the end"}


def test_square_tells_nothing_where_gradient_attacks_left_it_no_image(model, data):
    both = {"pgd": PGD(model, 0.1, steps=3), "square": Square(model, 0.1, steps=20)}
    name = "Square beats the gradient attacks"
    assert states(evaluate(model, data, both).checks)[name] != "not looked at"
    stopped = evaluate(model, data, both, max_forwards=1000, batch_size=4)
    assert not stopped.complete
    alone = evaluate(model, data, {"square": both["square"]})
    assert states(alone.checks)[name] == "not looked at"


def test_no_search_saw_a_success_that_could_have_been_denied(model, data):
    flags = evaluate(model, data, {"it": PGD(model, 1e-6, steps=1)}).checks
    assert states(flags)["two answers to one image"] == "not looked at"
    flags = evaluate(model, data, {"it": PGD(model, 0.3, steps=5)}).checks
    assert states(flags)["two answers to one image"] == "passed"


def test_a_radius_without_an_end_or_a_box_without_a_size_is_not_compared(model, data):
    name = "radius larger than the box"
    flags = evaluate(model, data, {"it": DeepFool(model, steps=2)}).checks
    assert states(flags)[name] == "not looked at"
    free = PGD(model, 0.1, steps=1, bounds=(-float("inf"), float("inf")))
    assert states(evaluate(model, data, {"it": free}).checks)[name] == "not looked at"


def test_hopskipjump_that_left_no_image_says_nothing_of_its_starts(model, data):
    flags = evaluate(model, data, {"it": HopSkipJump(model, 0.9, steps=1)}).checks
    assert states(flags)["no start for HopSkipJump"] in ("not looked at", "passed", "tripped")
    wrong = (model(data[0]).argmax(1) + 1) % 4
    flags = evaluate(model, (data[0], wrong), {"it": HopSkipJump(model, 0.9, steps=1)}).checks
    assert states(flags)["no start for HopSkipJump"] == "not looked at"
