"""What follows from the registers of attacks and norms, and that one new class is enough."""

import attack_table
import conformance
import pytest
import torch
from typer.testing import CliRunner

import ironmoe.attacks
from ironmoe.attacks import APGD, CW, FAB, FGSM, PGD, DeepFool, Square, evaluate, registry
from ironmoe.attacks.attack import FixedRadiusAttack
from ironmoe.attacks.balls import ball as balls
from ironmoe.attacks.random import uniform
from ironmoe.bench.attack.suite import Suite, SuiteError
from ironmoe.bench.cli.app import app
from ironmoe.kernels.attack_step import column


def help_of(command):
    output = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output
    return " ".join(output.replace("│", " ").split())


def test_the_documented_table_of_attacks_is_that_of_the_register():
    page = attack_table.PAGE.read_text()
    assert attack_table.BEGIN in page and attack_table.END in page
    assert page == attack_table.with_table(page), f"write it anew with: {attack_table.COMMAND}"


def test_every_registered_attack_is_exported():
    missing = set(registry.ATTACKS) - set(ironmoe.attacks.__all__)
    assert not missing, f"add to ironmoe.attacks.__all__: {missing}"


@pytest.fixture
def corner():
    """A new attack in one class, on the register while a test runs."""
    known = dict(registry.ATTACKS)

    @registry.register_attack(
        summary="Goes to the corner that the gradient at the image points to.",
        source="a test",
        takes=("steps",),
        names={"corner": {"steps": 3}},
    )
    class Corner(FixedRadiusAttack):
        def __init__(self, model, eps=0.1, *, steps=1, **options):
            super().__init__(model, eps, **options)
            self.steps = self.max_queries = steps

        def start(self, attempts):
            attempts["point"] = attempts["clean"]

        def loss(self, logits, attempts):
            return torch.nn.functional.cross_entropy(logits, attempts["label"], reduction="none")

        def advance(self, attempts, logits, loss, grad):
            attempts["point"] = self.ball(attempts).step(attempts["point"], grad, attempts["eps"])
            attempts["finished"] = attempts["finished"] | (attempts["queries"] >= self.steps)

    yield Corner
    registry.ATTACKS.clear()
    registry.ATTACKS.update(known)


def test_a_new_attack_is_known_everywhere(corner, tmp_path):
    assert "autoattack-rand, corner." in help_of("attack") and "3 for corner" in help_of("attack")
    assert "| `Corner` | Linf, L2, L1 | `corner` | a test |" in attack_table.table()

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
    made = Suite(("corner", "pgd"), "L2").make(model)
    assert isinstance(made["corner"], corner) and made["corner"].steps == 3
    with pytest.raises(SuiteError, match="--alpha applies to pgd, mifgsm, not to --attack corner"):
        Suite(("corner",), alpha_255=1.0).check()
    with pytest.raises(SuiteError, match=r"autoattack-rand, corner, .*got 'corn'"):
        Suite(("corn",)).check()

    mine = [case for case in conformance.cases() if case.kind is corner]
    assert [case.norm for case in mine] == ["Linf", "L2", "L1"]
    conformance.holds_for_all(conformance.reaches_the_closed_form, among=mine)
    conformance.holds_for_all(conformance.stays_in_ball_and_box, among=mine)
    conformance.holds_for_all(conformance.does_not_depend_on_the_batch, among=mine)
    conformance.holds_for_all(conformance.goes_on_from_a_cut_journal, tmp_path, among=mine)


def test_a_class_that_is_defined_again_takes_the_place_of_the_former_one(monkeypatch):
    """As when a cell of a notebook runs twice."""
    monkeypatch.setattr(registry, "ATTACKS", dict(registry.ATTACKS))
    monkeypatch.setattr(balls, "NORMS", dict(balls.NORMS))

    def cell():
        @registry.register_attack(summary="Nothing.", source="a test", names={"again": {}})
        class Again(FGSM):
            pass

        @balls.register_norm
        class Renamed(balls.ball_of("Linf")):
            norm = "renamed"

        return Again, Renamed

    cell()
    attack, norm = cell()
    assert registry.named_attacks()["again"].kind is attack
    assert balls.ball_of("renamed") is norm


def test_the_name_of_an_attack_is_given_once():
    with pytest.raises(ValueError, match="names of Another must be new, got pgd"):

        @registry.register_attack(summary="", source="", names={"pgd": {}, "other": {}})
        class Another(PGD):
            pass

    assert "corner" not in help_of("attack")


@pytest.fixture
def weighted():
    """A new norm in one class: Linf in which the first half of the pixels counts double."""

    @balls.register_norm
    class WeightedBall(balls.Ball):
        norm = "weighted"
        usual_radii = (3, 5)

        def weights(self):
            flat = torch.ones_like(self.center).flatten(1)
            flat[:, : flat.shape[1] // 2] = 2
            return flat.view_as(self.center)

        def project(self, point):
            reach = column(self.eps, self.center) / self.weights()
            inside = point.clamp(self.center - reach, self.center + reach)
            return inside.clamp(*self.bounds)

        def ascend(self, point, grad, alpha):
            return point + column(alpha, point) / self.weights() * grad.sign()

        def random_point(self, keys):
            noise = 2 * uniform(keys, self.center.shape[1:], self.center.dtype) - 1
            return self.project(self.center + column(self.eps, self.center) * noise)

        def tighten(self, point):
            while bool((over := self.distance(point) > self.eps).any()):
                nearer = point.lerp(self.center, 1e-6)
                point = torch.where(column(over, point).bool(), nearer, point)
            return point

        def distance(self, point):
            moved = (point.double() - self.center.double()).abs() * self.weights().double()
            return moved.flatten(1).amax(1)

    yield WeightedBall
    del balls.NORMS["weighted"]


def test_a_new_norm_works_where_a_ball_is_enough_and_is_refused_elsewhere(weighted):
    model, images = conformance.network(), conformance.images()
    labels = conformance.labels_of(model, images)
    for attack in (
        PGD(model, 0.15, steps=8, norm="weighted", restarts=2),
        FGSM(model, 0.15, norm="weighted"),
    ):
        result = attack.run(images, labels)
        moved = (result.adversarial - images).abs().flatten(1)
        assert result.success.any() and (result.distance <= 0.15).all()
        assert moved[:, :8].max() <= 0.075 < 0.1 < moved[:, 8:].max()
        report = evaluate(
            model, (images, labels), {"a": attack}, eps=[0.05, 0.15], batch_size=4, checks=False
        )
        assert torch.equal(report.attacks["a"].fell, result.success)

    for kind in (APGD, FAB, Square):
        with pytest.raises(ValueError, match=r"one of \('Linf', 'L2', 'L1'\), got 'weighted'"):
            kind(model, 0.1, norm="weighted")
    with pytest.raises(ValueError, match=r"one of \('Linf', 'L2'\), got 'weighted'"):
        DeepFool(model, 0.1, norm="weighted")
    with pytest.raises(ValueError, match=r"one of \('L2',\), got 'weighted'"):
        CW(model, 0.1, norm="weighted")


def test_a_new_norm_is_known_to_the_command_line(weighted):
    assert "3,5 in weighted" in help_of("demo") and "Linf, L2, L1 or weighted." in help_of("attack")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
    assert Suite(("pgd", "fgsm"), "weighted").make(model)["pgd"].norm == "weighted"
    message = "--norm must be Linf or L2 or L1 for --attack apgd-ce, got 'weighted'"
    with pytest.raises(SuiteError, match=message):
        Suite(("apgd-ce",), "weighted").check()
    mine = [case for case in conformance.cases() if case.norm == "weighted"]
    assert {case.name for case in mine} == {"fgsm", "pgd"}
    conformance.holds_for_all(conformance.stays_in_ball_and_box, among=mine)


def test_a_norm_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"must be one of \('Linf', 'L2', 'L1'\), got 'L7'"):
        balls.ball_of("L7")
    with pytest.raises(ValueError, match="norm must be a new name, got 'L2', which L2Ball has"):

        @balls.register_norm
        class Another(balls.ball_of("L2")):
            pass


def test_what_cannot_be_registered_is_refused():
    attack = {"summary": "Nothing.", "source": "a test"}
    for names, message in ((["a"], "names must be a mapping"), ({"a,b": {}}, "must have no comma")):
        with pytest.raises((TypeError, ValueError), match=message):
            registry.register_attack(names=names, **attack)
    with pytest.raises(TypeError, match="takes must be a tuple of options, got 'steps'"):
        registry.register_attack(names={}, takes="steps", **attack)
    with pytest.raises(TypeError, match="must be a class of Attack, got <class 'dict'>"):
        registry.register_attack(names={}, **attack)(dict)

    with pytest.raises(TypeError, match="must be a class of Ball, got <class 'dict'>"):
        balls.register_norm(dict)
    with pytest.raises(TypeError, match=r"must define every method of Ball, got none for ascend, "):
        balls.register_norm(type("Half", (balls.Ball,), {"norm": "half"}))
    with pytest.raises(TypeError, match=r"Number\.norm must be a string, got 7"):
        balls.register_norm(type("Number", (balls.ball_of("Linf"),), {"norm": 7}))
    with pytest.raises(ValueError, match="norm must be one of"):
        balls.ball_of(["Linf"])
