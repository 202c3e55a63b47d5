"""AutoAttack as people know it: settings of its parts, log lines, a state that it goes on from."""

import re

import pytest
import torch
import toys

from ironmoe.attacks import AutoAttack, JournalError


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs(24)
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(data[0].float(), data[1])


def short(model, *, norm="Linf", eps=0.08, **options):
    adversary = AutoAttack(model, norm, eps, **options)
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 5
    adversary.square.n_queries = 30
    return adversary


def settings(adversary):
    return {
        stage.name: (stage.steps, stage.restarts, stage.eot, stage.targets)
        for stage in adversary.stages
    }


def test_settings_of_the_official_parts_reach_the_stages_they_are_for(model):
    adversary = AutoAttack(model, version="plus")
    adversary.apgd.n_restarts = 2
    adversary.apgd.eot_iter = 3
    adversary.apgd_targeted.n_target_classes = 5
    adversary.fab.n_restarts = 4
    adversary.fab.n_target_classes = 3
    adversary.square.n_queries = 70
    assert settings(adversary) == {
        "apgd-ce": (100, 2, 3, 0),
        "apgd-dlr": (100, 2, 3, 0),
        "fab": (100, 4, 1, 0),
        "square": (70, 1, 1, 0),
        "apgd-t": (100, 1, 1, 5),
        "fab-t": (100, 1, 1, 3),
    }
    assert adversary.apgd.n_restarts == 2 and adversary.apgd.restarts == 2
    assert adversary.square.p_init == 0.8 and adversary.fab.n_target_classes == 3
    assert repr(adversary.square) == "AutoAttack.square(steps=70, p_init=0.8, restarts=1)"
    assert {"n_iter", "n_restarts", "rho"} <= set(dir(adversary.apgd))

    # What counts is what the stages are made with, whatever list of attacks there is.
    adversary.attacks_to_run = ["square", "apgd-ce"]
    assert settings(adversary) == {"square": (70, 1, 1, 0), "apgd-ce": (100, 2, 3, 0)}

    adversary.set_version("standard")
    assert settings(adversary) == settings(AutoAttack(model))
    adversary.set_version("rand")
    assert settings(adversary) == settings(AutoAttack(model, version="rand"))
    with pytest.raises(ValueError, match=r"version must be one of .* got 'custom'"):
        adversary.set_version("custom")


def test_a_seed_that_is_set_later_counts(model):
    adversary = AutoAttack(model)
    assert {stage.seed for stage in adversary.stages} == {0}
    adversary.seed = 5
    assert {stage.seed for stage in adversary.stages} == {5}


def test_what_a_part_does_not_have_cannot_be_set(model):
    adversary = AutoAttack(model)
    with pytest.raises(AttributeError, match=r"apgd must be set by one of .*n_iter, .*got n_itre$"):
        adversary.apgd.n_itre = 3
    with pytest.raises(AttributeError, match=r"got norm: give norm= to AutoAttack"):
        adversary.apgd.norm = "L2"
    with pytest.raises(AttributeError, match=r"got n_target_classes"):
        adversary.apgd.n_target_classes = 9  # it has no targets
    with pytest.raises(AttributeError, match=r"square must be set by one of n_queries, .* got rho"):
        adversary.square.rho  # noqa: B018
    with pytest.raises(ValueError, match="restarts must be at least 1, got 0"):
        adversary.apgd.n_restarts = 0
    with pytest.raises(ValueError, match="three_radii=True goes with norm='L1' alone"):
        adversary.apgd.use_largereps = True
    with pytest.raises(ValueError, match=r"resc_schedule must be False, got True: windows shrink"):
        adversary.square.resc_schedule = True
    adversary.square.resc_schedule = False
    with pytest.raises(AttributeError):
        adversary.apgd = None
    with pytest.raises(AttributeError, match=r"no attribute 'epsilon' to set.* eps=0.1"):
        adversary.epsilon = 0.1
    assert settings(adversary) == settings(AutoAttack(model))


def test_a_part_attacks_by_itself(model, data):
    adversary = short(model)
    alone = adversary.run_standard_evaluation_individual(*data)
    assert torch.equal(adversary.apgd.perturb(*data), alone["apgd-ce"])
    assert torch.equal(adversary.square.perturb(data[0]), alone["square"])
    assert (model(adversary.fab.perturb(*data)).argmax(1) != data[1]).any()


def test_the_log_says_what_the_official_one_says(model, data, tmp_path, capsys):
    path = tmp_path / "log.txt"
    adversary = short(model, verbose=True, log_path=path)
    assert capsys.readouterr().out == ""
    final = adversary.run_standard_evaluation(*data, bs=10)
    printed = capsys.readouterr().out
    assert path.read_text() == printed

    lines = printed.splitlines()
    assert lines[0] == "using standard version including apgd-ce, apgd-t, fab-t, square."
    clean = float((model(data[0]).argmax(1) == data[1]).double().mean())
    assert lines[1] == f"initial accuracy: {clean:.2%}"
    assert re.match(r"\d+/24 images done, \d+ of \d+ in this run misclassified", lines[2])

    robust = float((model(final).argmax(1) == data[1]).double().mean())
    assert 0 < robust < clean
    assert lines[-1].startswith(f"robust accuracy: {robust:.2%} (total time ")
    after = [line for line in lines if line.startswith("robust accuracy after ")]
    names = [line.split()[3].rstrip(":") for line in after]
    assert names == ["APGD-CE", "APGD-T", "FAB-T", "SQUARE"]
    shares = [float(line.split()[-1].rstrip("%")) for line in after]
    assert shares == sorted(shares, reverse=True) and f"{shares[-1]:.2f}%" in lines[-1]

    moved = float((final - data[0]).abs().max())
    text = f"max Linf perturbation: {moved:.5f}, nan in tensor: 0, max: {float(final.max()):.5f}"
    assert f"{text}, min: {float(final.min()):.5f}" in lines
    assert any(line.startswith("fewer classes than the loss needs: ") for line in lines)


def test_the_log_is_written_without_being_printed_and_goes_on(model, data, tmp_path, capsys):
    path = tmp_path / "log.txt"
    adversary = short(model, log_path=str(path))
    adversary.run_standard_evaluation(*data)
    first = path.read_text()
    adversary.run_standard_evaluation_individual(*data)
    added = path.read_text().removeprefix(first).splitlines()
    assert [line.split()[3] for line in added] == ["APGD-CE:", "APGD-T:", "FAB-T:", "SQUARE:"]
    assert all(re.match(r"robust accuracy by \S+ \d+\.\d+ %", line) for line in added)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"log_path must lie in a folder .*nowhere"):
        AutoAttack(model, log_path=tmp_path / "nowhere" / "log.txt")


def test_the_log_changes_nothing_that_is_found(model, data, tmp_path):
    plain = short(model).run_standard_evaluation(*data, return_labels=True)
    told = short(model, log_path=tmp_path / "log").run_standard_evaluation(*data, 7, True)
    assert torch.equal(plain[1], told[1])
    torch.testing.assert_close(plain[0], told[0], rtol=0, atol=1e-9)


def test_a_state_is_a_folder_that_the_same_call_goes_on_from(model, data, tmp_path):
    asked = []

    def counting(x):
        asked.append(len(x))
        return model(x)

    folder = tmp_path / "state"
    whole = short(counting).run_standard_evaluation(*data, state_path=folder)
    first = sum(asked)
    again = short(counting).run_standard_evaluation(*data, state_path=folder)
    assert torch.equal(whole, again)
    assert sum(asked) - first < first / 2  # the look at the model alone

    with pytest.raises(JournalError, match="attacks must be as in the journal"):
        short(counting, seed=1).run_standard_evaluation(*data, state_path=folder)
    official = tmp_path / "state.json"
    official.write_text("{}")
    with pytest.raises(ValueError, match=r"state_path must be a folder, .*got the file"):
        short(counting).run_standard_evaluation(*data, state_path=official)


def test_each_attack_by_itself_gives_its_classes_too(model, data):
    found = short(model).run_standard_evaluation_individual(*data, return_labels=True)
    for images, classes in found.values():
        assert torch.equal(model(images).argmax(1), classes)
    assert any((classes != data[1]).any() for _, classes in found.values())


def test_the_clean_accuracy_is_that_of_one_pass_in_batches(model, data):
    images, labels = data
    wrong = labels.clone()
    wrong[:6] = (wrong[:6] + 1) % 4
    expected = float((model(images).argmax(1) == wrong).double().mean())
    assert AutoAttack(model).clean_accuracy(images, wrong, bs=5) == expected
    assert AutoAttack(model).clean_accuracy(images[:0], wrong[:0]) == 0
