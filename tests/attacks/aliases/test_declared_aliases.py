"""Every foreign name that a registered attack declares: it gives the attack of the own name."""

import inspect

import conformance
import pytest
import torch

from ironmoe.attacks import APGD, CW, FAB, FGSM, PGD, HopSkipJump, registry
from ironmoe.attacks.aliases.declared import Only, Turned
from ironmoe.attacks.aliases.own import aliases_of, own_arguments
from ironmoe.attacks.evaluation.describe import describe_attack

NAMES = [
    pytest.param(entry.kind, name, id=f"{entry.kind.__name__}-{name}")
    for entry in registry.ATTACKS.values()
    for name in aliases_of(entry.kind)
]
MODEL, IMAGES = conformance.network(), conformance.images(4)
LABELS = conformance.labels_of(MODEL, IMAGES)

every_name = pytest.mark.parametrize(("kind", "name"), NAMES)


def default_of(kind, own):
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters
        if own in parameters:
            return parameters[own].default
    raise AssertionError(own)


def another(kind, own):
    """A value other than the default, for an attack that is short."""
    default = default_of(kind, own)
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return default
    if isinstance(default, int):
        return 2
    return 0.9 * default or 0.5


def make(kind, **options):
    """An attack in the first norm that takes the options, short where they leave it open."""
    own = own_arguments(kind)
    given = dict(conformance.SHORT.get(kind.__name__, {}))
    given |= {"steps": 2} if "steps" in own and "steps" not in written(kind, options) else {}
    norms = [{}] if "norm" in written(kind, options) else [{"norm": norm} for norm in kind.norms]
    for norm in norms:
        try:
            attack = kind(MODEL, **given, **norm, **options)
        except ValueError as error:
            refusal = error
        else:
            if attack.stages[0] is not attack:
                for stage in attack.stages:
                    stage.steps = stage.max_queries = 2
            return attack
    raise refusal


def written(kind, options):
    """The own names that options set."""
    aliases = {name: aliases_of(kind).get(name) for name in options}
    return {
        alias.into if isinstance(alias, Turned) else alias if isinstance(alias, str) else name
        for name, alias in aliases.items()
    }


def check_same(one, other):
    assert repr(one) == repr(other)
    assert describe_attack(one) == describe_attack(other)
    first, second = (attack.run(IMAGES, LABELS) for attack in (one, other))
    assert torch.equal(first.adversarial, second.adversarial)
    assert torch.equal(first.forwards, second.forwards)


def test_every_attack_has_aliases():
    assert {parameter.values[0] for parameter in NAMES} == {
        entry.kind for entry in registry.ATTACKS.values()
    }


@every_name
def test_an_alias_gives_the_attack_of_the_own_name_or_changes_nothing(kind, name):
    alias = aliases_of(kind)[name]
    if isinstance(alias, Only):
        for value in alias.values:
            check_same(make(kind, **{name: value}), make(kind))
        return

    own = alias if isinstance(alias, str) else alias.into
    value = another(kind, own) if isinstance(alias, str) else alias.example
    here = value if isinstance(alias, str) else alias.how(value)
    check_same(make(kind, **{name: value}), make(kind, **{own: here}))
    if here != default_of(kind, own):
        plain = make(kind, **({own: default_of(kind, own)} if own != "steps" else {"steps": 3}))
        assert describe_attack(plain) != describe_attack(make(kind, **{name: value}))


@every_name
def test_an_argument_is_given_under_one_name_and_one_of_the_values_that_are_taken(kind, name):
    alias = aliases_of(kind)[name]
    if isinstance(alias, Only):
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got 'another': .{{10}}"):
            kind(MODEL, **{name: "another"})
        assert not alias.instead.endswith(".")
        return

    own = alias if isinstance(alias, str) else alias.into
    value = another(kind, own) if isinstance(alias, str) else alias.example
    with pytest.raises(TypeError, match=f"{own} must be given once, got it as .* and as {name}="):
        kind(MODEL, **{own: another(kind, own), name: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: APGD(MODEL, n_classes=1), "n_classes must be at least 2, got 1"),
        (lambda: FAB(MODEL, n_classes=2.5), r"n_classes must be a whole number.*, got 2\.5"),
        (lambda: HopSkipJump(MODEL, max_num_evals=1.5), r"max_num_evals must be .*, got 1\.5"),
        (lambda: HopSkipJump(MODEL, max_num_evals="9"), "max_num_evals must be .*, got '9'"),
        (lambda: HopSkipJump(MODEL, constraint="L2"), r"one of \('l2', 'linf'\), got 'L2'"),
        (lambda: FAB(MODEL, multi_targeted=True, targets=3), None),
        (lambda: PGD(MODEL, verbose=0), "verbose must be False, got 0"),
        (lambda: FGSM(MODEL, random_start=0), "random_start must be False, got 0"),
        (lambda: CW(MODEL, abort_early=1), "abort_early must be True, got 1"),
        (lambda: FGSM(MODEL, alpha=torch.ones(2)), "alpha must be None, got tensor"),
    ],
)
def test_a_foreign_value_that_is_none_is_named_as_the_user_wrote_it(call, message):
    if message is None:
        assert call()
        return
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    "kind", [entry.kind for entry in registry.ATTACKS.values()], ids=lambda kind: kind.__name__
)
def test_an_argument_that_nobody_knows_is_named_beside_those_that_are_known(kind):
    with pytest.raises(TypeError, match=r"got strength$") as caught:
        kind(MODEL, strength=3)
    text = str(caught.value)
    assert text.startswith(f"arguments of {kind.__name__} must be among ")
    assert all(own in text for own in own_arguments(kind))
    assert "eot_iter (eot)" in text

    for own in ("seed", "bounds", "routing", "goal"):  # by their own names they are taken
        assert own in own_arguments(kind)
