"""What every attack inherits: foreign names of its arguments, and the calls of other libraries."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ironmoe.attacks.aliases.declared import Aliases, Only, declare
from ironmoe.attacks.aliases.own import alias_of, known_arguments, own_arguments
from ironmoe.attacks.aliases.translated import MADE, with_aliases
from ironmoe.attacks.engine.attacked_model import AttackedModel
from ironmoe.attacks.engine.attempts import where
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.extra import Extra, extra_columns
from ironmoe.attacks.result import AttackResult

TARGETS = "make the attack with targeted=True, and call it with the classes to reach"
INSTEAD = {
    "set_normalization_used": "make the attack with normalize=(mean, std), and call it with images "
    "that are not normalised",
    "set_mode_default": "make the attack with targeted=False",
    "set_mode_targeted_by_label": TARGETS,
    "set_mode_targeted_by_function": TARGETS,
    "set_mode_targeted_random": TARGETS,
    "set_mode_targeted_least_likely": TARGETS,
    "set_model_training_mode": "give as model a function that calls the model in this mode; a "
    "module is put into eval mode",
    "set_model": "make another attack for the other model",
    "set_device": "make the attack with device=",
    "save": "evaluate(model, data, attacks, keep_adversarial=True) keeps the images",
}
"""Methods of torchattacks → what to do here."""

SINCE = "_set_since"
"""What an attack has of ``read_late`` since it was made."""


class FamiliarCalls(ABC):
    """``attack(images, labels)`` as in torchattacks, ``attack.perturb(x, y)`` as in the official
    code, and the arguments of both."""

    aliases: ClassVar[Aliases] = declare()
    """Foreign names of arguments of this very class; those of its bases hold as well."""

    read_late: ClassVar[frozenset[str]] = frozenset()
    """Attributes that are read no earlier than an attack runs, so that it need not be made again
    where they are set."""

    attacked_model: AttackedModel

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls) or "aliases" in vars(cls):
            type.__setattr__(cls, "__init__", with_aliases(cls))

    def __setattr__(self, name: str, value: Any) -> None:
        """An argument of the constructor counts as if the attack had been made with it.

        Raises:
            AttributeError: another attribute of an attack of the library, once it is made. Setting
                it would change nothing, or only a part of what it says.
            ValueError, TypeError: a value that the constructor refuses; nothing has changed then.
        """
        known = vars(self)
        if MADE not in known or name.startswith("_"):
            super().__setattr__(name, value)
        elif name in self.read_late or self._is_method(name):
            super().__setattr__(name, value)
            super().__setattr__(SINCE, known.get(SINCE, {}) | {name: value})
        elif name in own_arguments(type(self)) and name in known:
            self.make_again({name: value})
        else:
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r} to set: "
                f"{instead_of_setting(self, name, value)}"
            )

    def _is_method(self, name: str) -> bool:
        """Whether it is one of the class, which an attack may have in a form of its own."""
        is_argument = name in own_arguments(type(self)) or alias_of(type(self), name) is not None
        return not is_argument and inspect.isroutine(getattr(type(self), name, None))

    def make_again(self, changed: Mapping[str, Any]) -> None:
        """Run the constructor once more, with other values of these arguments."""
        before = dict(vars(self))
        vars(self).clear()
        try:
            type(self).__init__(self, **(before[MADE] | changed))
            self.take_over(before, changed)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    def take_over(self, before: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
        """After the constructor has run once more, set again what was set since and is no argument.

        Args:
            before: the attributes until then.
            changed: the arguments that got other values.
        """
        since = before.get(SINCE, {})
        vars(self).update(since, **{SINCE: since})

    if not TYPE_CHECKING:  # it would make every name an attribute

        def __getattr__(self, name: str) -> Any:
            """AttributeError; for a method of torchattacks it says what to do instead."""
            if name in INSTEAD:
                raise AttributeError(f"{type(self).__name__} has no {name}: {INSTEAD[name]}")
            return super().__getattribute__(name)  # it says what is missing, here or further in

    @abstractmethod
    def run(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor | None = None,
        *,
        extra: Extra | None = None,
        passes: int | None = None,
    ) -> AttackResult:
        """Attack a batch."""

    def __call__(self, images: Tensor, labels: Tensor, *, extra: Extra | None = None) -> Tensor:
        """images (N, …) in ``bounds``, labels (N,) int64 → adversarial images, float32 (float64 for
        float64 images). They go to the device of the model, or to ``device``."""
        return self._run_there(images, labels, extra).adversarial

    def perturb(
        self,
        x: Tensor,
        y: Tensor | None = None,
        best_loss: bool = False,
        x_init: Tensor | None = None,
        *,
        extra: Extra | None = None,
    ) -> Tensor:
        """The call of the official attacks.

        Args:
            x: (N, …) images in ``bounds``.
            y: (N,) int64 labels; None: the classes that the model gives the images.
            best_loss: must be False; ``early_stop=False`` of the constructor keeps the point of the
                highest loss.
            x_init: must be None: an attack chooses its own starting points.
            extra: further inputs of the model, as in ``run``.

        Returns:
            (N, …) adversarial images, the clean one where none was found.
        """
        if best_loss:
            raise ValueError(
                f"best_loss must be False, got {best_loss}: make the attack with early_stop=False, "
                "and the call attack(x, y) returns the points of the highest loss"
            )
        if x_init is not None:
            raise ValueError("x_init must be None, since an attack chooses its own starts, got one")
        x = self._there(x)
        result = self._run_there(x, self._classes(x, extra) if y is None else y, extra)
        return where(result.success, result.adversarial, x.to(result.adversarial.dtype))

    def _there(self, tensor: Tensor) -> Tensor:
        """On the device where the model is attacked; what is no tensor stays for the checks."""
        device = self.attacked_model.device
        return tensor if device is None or not isinstance(tensor, Tensor) else tensor.to(device)

    def _run_there(self, images: Tensor, labels: Tensor, extra: Extra | None) -> AttackResult:
        further: dict[str, Any] = {} if extra is None else {"extra": extra}
        return self.run(self._there(images), self._there(labels), **further)

    def _classes(self, images: Tensor, extra: Extra | None) -> Tensor:
        """(N,) what the model says of the images.

        Raises:
            ValueError: the goal is about something else than leaving this class.
        """
        goal = self.attacked_model.goal
        if goal.targeted or not goal.has_classes:
            raise ValueError(f"y must be the labels of the images for {goal}, got None")
        columns = {
            name: column.to(images.device)
            for name, column in extra_columns(extra, len(images)).items()
        }
        self.attacked_model.image_dtype = images.dtype
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        with borrowed(self.attacked_model.model):
            outputs = self.attacked_model.predict(wide, columns)
        return self.attacked_model.goal.prediction(outputs)


def unknown_arguments(kind: type, names: list[str]) -> TypeError:
    """The error of a constructor that is left with arguments which no class takes."""
    return TypeError(
        f"arguments of {kind.__name__} must be among {known_arguments(kind)}, got "
        f"{', '.join(names)}"
    )


def instead_of_setting(attack: FamiliarCalls, name: str, value: Any) -> str:
    """What to do where an attribute of an attack cannot be set, as a sentence."""
    kind = type(attack)
    alias = alias_of(kind, name)
    if isinstance(alias, Only):
        return alias.instead
    if isinstance(alias, str) and alias in vars(attack):
        return f"set {alias}, or make a new attack with {alias}={value!r}"
    if alias is not None or name in own_arguments(kind):
        return f"make a new attack with {name}={value!r}"
    return f"make a new attack; its arguments are {known_arguments(kind)}"
