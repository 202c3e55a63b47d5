"""Attributes that are set after an attack was made: they count as if it had been made so, or they
are refused."""

import copy

import conformance
import pytest
import torch

from ironmoe.attacks import APGD, PGD, AutoAttack, HopSkipJump, Targeted, TopK, registry
from ironmoe.attacks.aliases.declared import Only
from ironmoe.attacks.aliases.own import alias_of, aliases_of, own_arguments
from ironmoe.attacks.evaluation.describe import describe_attack
from ironmoe.attacks.methods.last_iterate import LastIteratePGD

MODEL = conformance.network()
IMAGES = (conformance.images(3) * 255).round() / 255  # on the grid of ``levels``
LABELS = conformance.labels_of(MODEL, IMAGES)
KINDS = [*(entry.kind for entry in registry.ATTACKS.values()), LastIteratePGD]

OTHER = {
    "eps": 0.07,
    "bounds": (-0.5, 1.5),
    "seed": 9,
    "eot": 2,
    "goal": TopK(2),
    "levels": 256,
    "alpha": 0.01,
    "steps": 3,
    "restarts": 2,
    "targets": 1,
    "rho": 0.5,
    "alpha_max": 0.2,
    "eta": 1.2,
    "beta": 0.8,
    "p_init": 0.3,
    "c": 0.1,
    "confidence": 0.5,
    "lr": 0.05,
    "search_steps": 2,
    "overshoot": 0.1,
    "top_classes": 3,
    "decay": 0.5,
    "initial_probes": 7,
    "max_probes": 9,
    "start_tries": 30,
    "starts": torch.rand(3, *IMAGES.shape[1:]),
    "gamma": 2.0,
    "version": "rand",
    "attacks_to_run": ["square"],
    "log_path": "log.txt",
}
"""Another value of each argument; of a truth value it is the other one."""


def make(kind, **options):
    """An attack that is short."""
    given = dict(conformance.SHORT.get(kind.__name__, {}))
    given |= {"steps": 2} if "steps" in own_arguments(kind) else {}
    attack = kind(MODEL, **(given | options))
    if kind is AutoAttack:
        attack.apgd_targeted.n_iter = attack.fab.n_iter = 2
        attack.square.n_queries = 5
    return attack


def arguments_of(kind):
    """Those of its constructor that an attack shows under their names."""
    return [name for name in own_arguments(kind) if name in vars(make(kind))]


def other_names(kind):
    """Every other public name of an attack, of its constructor and of other libraries, and one of
    none; but for methods, and for what is read when it runs."""
    of_class = [name for name in dir(kind) if not callable(getattr(kind, name, None))]
    names = {*vars(make(kind)), *of_class, *own_arguments(kind), *aliases_of(kind), "colour"}
    names -= {*arguments_of(kind), *kind.read_late}
    return sorted(name for name in names if not name.startswith("_"))


def other_value(attack, name):
    now = getattr(attack, name, None)
    if name == "norm":
        return next((norm for norm in type(attack).norms if norm != now), "L7")
    return not now if isinstance(now, bool) else OTHER.get(name, "other")


def outcome(attack):
    """What it finds, or why it finds nothing."""
    torch.manual_seed(0)  # of ``PGD.torchattacks``
    try:
        result = attack.run(IMAGES, LABELS)
    except ValueError as error:
        return str(error)
    return result.adversarial, result.success, result.forwards


def look(attack):
    """Every setting, and what is derived from them."""
    names = ("name", "max_queries", "keeps", "inside", "exhaustive", "starts_clean", "targets")
    derived = [[getattr(stage, name) for name in names] for stage in attack.stages]
    return describe_attack(attack), repr(attack), attack.search, derived


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def check_same(one, other):
    assert look(one) == look(other)
    assert all(map(same, outcome(one), outcome(other)))


ARGUMENTS = [(kind, name) for kind in KINDS for name in arguments_of(kind)]


@pytest.mark.parametrize(
    ("kind", "name"), ARGUMENTS, ids=[f"{kind.__name__}-{name}" for kind, name in ARGUMENTS]
)
def test_an_argument_that_is_set_counts_as_if_the_attack_had_been_made_with_it(
    kind, name, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    attack = make(kind)
    if kind is not HopSkipJump:  # whose many queries take their time
        outcome(attack)
    value, before = other_value(attack, name), look(attack)
    try:
        made = make_with(kind, name, value)
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error)):
            setattr(attack, name, value)
        check_same(attack, make(kind))
        return

    setattr(attack, name, value)
    if name == "version":
        attack.apgd.n_iter = made.apgd.n_iter = 2
    assert same(getattr(attack, name), getattr(made, name))
    assert look(attack) != before or name in ("log_path", "verbose")
    check_same(attack, made)


def make_with(kind, name, value):
    """The attack that another value should lead to. A version takes back what was set before."""
    return AutoAttack(MODEL, version=value) if name == "version" else make(kind, **{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_argument_is_refused_with_what_to_do(kind):
    attack = make(kind)
    before = look(attack)
    names = other_names(kind)
    for name in names:
        with pytest.raises(AttributeError, match=f"has no attribute {name!r} to set: ") as refused:
            setattr(attack, name, other_value(attack, name))
        alias = alias_of(kind, name)
        advice = alias.instead if isinstance(alias, Only) else "make a new attack"
        assert advice in str(refused.value)
    assert look(attack) == before
    assert {"keeps", "model", "stages", "normalize", "eot_iter", "colour"} <= {*names}


def test_the_table_of_other_values_has_every_argument_that_can_be_set():
    names = {name for kind, name in ARGUMENTS if not isinstance(getattr(make(kind), name), bool)}
    assert names == {*OTHER, "norm"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_while_an_attack_runs_stays_when_an_argument_is_set(kind):
    attack = make(kind)
    for stage in attack.stages:
        stage.name = f"my {stage.name}"
        stage.max_queries = stage.max_queries - 1
    stage, name, limit = attack.stages[0], attack.stages[0].name, attack.stages[0].max_queries
    stage.seed = 3
    assert (stage.name, stage.max_queries, stage.seed) == (name, limit, 3)

    attack = make(kind)
    model = attack.attacked_model
    attack.attacked_model = model
    attack.seed = 4
    assert attack.attacked_model is model
    assert all(stage.attacked_model is model for stage in attack.stages)


def test_a_method_may_be_that_of_one_attack_and_stays():
    attack, asked = APGD(MODEL, steps=2), []
    attack.score = lambda attempts, loss: asked.append(len(loss)) or loss
    attack.early_stop = False
    attack.run(IMAGES, LABELS)
    assert asked


def test_another_goal_is_that_of_the_predictions_that_count():
    attack = PGD(MODEL, 0.05, steps=3)
    attack.attacked_model = attack.attacked_model
    attack.targeted = True
    assert isinstance(attack.goal, Targeted) and attack.attacked_model.goal is attack.goal
    wanted = (LABELS + 1) % 3
    result = attack.run(IMAGES, wanted)
    expected = PGD(MODEL, 0.05, steps=3, targeted=True).run(IMAGES, wanted)
    assert torch.equal(result.adversarial, expected.adversarial)


def test_a_seed_of_the_clock_stays_when_something_else_is_set():
    attack = PGD(MODEL, seed=None)
    seed = attack.seed
    attack.eps = 0.1
    assert attack.seed == seed


def test_a_copy_is_an_attack_of_its_own():
    attack = APGD(MODEL, steps=4)
    other = copy.copy(attack)
    other.norm = "L2"
    other.name = "other"
    assert look(attack) == look(APGD(MODEL, steps=4))
    made = APGD(MODEL, steps=4, norm="L2")
    made.name = "other"
    check_same(other, made)


def test_what_was_set_in_an_autoattack_counts_on_when_an_argument_is_set():
    attack = AutoAttack(MODEL)
    attack.attacks_to_run = ["apgd-ce", "square"]
    attack.apgd.n_iter = 7
    attack.verbose = True
    attack.norm = "L2"
    attack.eot = 3
    assert [(s.name, s.norm, s.steps, s.eot) for s in attack.stages] == [
        ("apgd-ce", "L2", 7, 3),
        ("square", "L2", 5000, 3),
    ]
    assert attack.version == "standard" and attack.verbose

    stages = attack.stages
    attack.verbose = False
    assert attack.stages is stages  # and what was set in them

    attack.attacks_to_run.append("fab-t")
    attack.eps = 0.2
    assert [stage.eps for stage in attack.stages] == [0.2, 0.2, 0.2]

    attack.version = "rand"
    rand = AutoAttack(MODEL, "L2", 0.2, "rand")
    assert look(attack) == look(rand)
    attack.bounds = (0.0, 2.0)
    assert look(attack) == look(AutoAttack(MODEL, "L2", 0.2, "rand", bounds=(0.0, 2.0)))
    attack.set_version("plus")
    assert {stage.eot for stage in attack.stages} == {1}
    attack.seed = 3
    assert {(stage.eot, stage.seed) for stage in attack.stages} == {(1, 3)}


def test_a_setting_that_does_not_go_with_what_was_set_is_refused_and_changes_nothing():
    attack = AutoAttack(MODEL, norm="L1", eps=5.0)
    attack.apgd.use_largereps = True
    before = look(attack)
    with pytest.raises(ValueError, match="three_radii=True goes with norm='L1' alone"):
        attack.norm = "L2"
    with pytest.raises(ValueError, match=r"version must be one of .* got 'custom'"):
        attack.version = "custom"
    assert look(attack) == before and attack.norm == "L1"
