"""The register of training methods: each class is registered where it is defined.

From here follow the names, options and help of ``ironmoe train``, the table in docs/training.md and
the tests that every method must pass. Nothing here knows a method by name.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ironmoe.attacks.training.method import TrainingMethod

AnyMethod = TypeVar("AnyMethod", bound=type[TrainingMethod])


class RegisteredMethod(NamedTuple):
    """A training method.

    kind: the class
    name: on the command line
    summary: what it does, in one sentence, for help and docs
    cost: of a batch with n inner steps, in forward passes of a batch; a backward pass to the images
        costs 1, one to images and weights 2
    source: where it was published, an arXiv number or a venue
    takes: options of its constructor beyond those of ``TrainingMethod``, for the command line
    needs_experts: it makes no sense for a dense model
    single_step: it attacks by one step, so a model may learn to answer that step alone
    ignores: arguments of ``TrainingMethod`` that mean nothing in its training
    """

    kind: type[TrainingMethod]
    name: str
    summary: str
    cost: str
    source: str
    takes: tuple[str, ...] = ()
    needs_experts: bool = False
    single_step: bool = False
    ignores: tuple[str, ...] = ()


TRAINING_METHODS: dict[str, RegisteredMethod] = {}
"""name → entry, in the order of registration."""


def register_training_method(
    name: str,
    *,
    summary: str,
    cost: str,
    source: str,
    takes: tuple[str, ...] = (),
    needs_experts: bool = False,
    single_step: bool = False,
    ignores: tuple[str, ...] = (),
) -> Callable[[AnyMethod], AnyMethod]:
    """A class decorator that registers a method; the arguments are those of ``RegisteredMethod``. A
    class that is defined again, as in a notebook, takes the place of the former one.

    Raises:
        TypeError: the class does not derive from ``TrainingMethod``.
        ValueError: another method has this name.
    """

    def register(kind: AnyMethod) -> AnyMethod:
        if not (isinstance(kind, type) and issubclass(kind, TrainingMethod)):
            raise TypeError(f"a training method must be a class of TrainingMethod, got {kind!r}")
        known = TRAINING_METHODS.get(name)
        if known is not None and known.kind.__qualname__ != kind.__qualname__:
            raise ValueError(f"name must be new, got {name!r}, which {known.kind.__name__} has")

        TRAINING_METHODS[name] = RegisteredMethod(
            kind, name, summary, cost, source, takes, needs_experts, single_step, ignores
        )
        return kind

    return register


def arrange(*kinds: type[TrainingMethod]) -> None:
    """List these classes first, in this order, whatever the order in which files import each
    other."""
    entries = dict(TRAINING_METHODS)
    TRAINING_METHODS.clear()
    first = [name for kind in kinds for name, entry in entries.items() if entry.kind is kind]
    for name in (*first, *entries):
        TRAINING_METHODS[name] = entries[name]


def training_method(name: str) -> RegisteredMethod:
    """The entry of this name. ValueError names the known ones."""
    if name not in TRAINING_METHODS:
        raise ValueError(f"method must be one of {', '.join(TRAINING_METHODS)}, got {name!r}")
    return TRAINING_METHODS[name]
