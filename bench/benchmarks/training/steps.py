"""Training steps that are measured beside each other: ironmoe's, the loop that most repositories
have, and the loop around an attack of torchattacks."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks.training import TRAINING_METHODS, TrainingMethod, pgd
from ironmoe.attacks.training.inner.loop import default_alpha
from ironmoe.moe import collect_aux_loss

START_SEED = 0  # torchattacks takes no start, but draws the same one under the same seed
PGD_STEPS = (10, 4)
COMMON = "common loop"
PEER = "torchattacks"


class StepSettings(NamedTuple):
    """What one step does. eps, alpha: in units of the pixel range; dtype: of the model, under
    autocast; None is float32."""

    eps: float
    alpha: float
    steps: int
    dtype: torch.dtype | None = None
    clip_norm: float = 1.0


def random_start(images: Tensor, eps: float) -> Tensor:
    """(B, …) the images, moved by at most ``eps`` at each pixel, as START_SEED draws it."""
    torch.manual_seed(START_SEED)
    return (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)


class Contender(ABC):
    """One way to make a training step, on a copy of the model.

    The learning rate is 0: the optimizer computes as always, but the weights stay, so that every
    contender does the same work in every round.
    """

    updates = 1

    def __init__(self, name: str, model: nn.Module, settings: StepSettings) -> None:
        self.name = name
        self.settings = settings
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    @abstractmethod
    def losses(self, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """The loss of each update that the step makes."""

    def adversarial(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """(B, …) the images of the inner attack from ``random_start``, the model in eval mode; None
        if the step has no such attack."""
        return None

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Inner attack, outer pass and update of the weights."""
        self.model.train()
        for loss in self.losses(images, labels):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
            self.optimizer.step()


class Ours(Contender):
    """A training method of ironmoe, by its name."""

    def __init__(
        self, name: str, model: nn.Module, settings: StepSettings, method: str, **options: Any
    ) -> None:
        super().__init__(name, model, settings)
        self.method: TrainingMethod = TRAINING_METHODS[method].kind(
            self.model, settings.eps, autocast_dtype=settings.dtype, **options
        )
        self.updates = self.method.updates_per_batch

    def losses(self, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        for update in self.method.updates(images, labels):
            yield update.loss


class OurPGD(Ours):
    """PGD-AT of ironmoe."""

    def __init__(self, name: str, model: nn.Module, settings: StepSettings) -> None:
        steps = {"steps": settings.steps, "alpha": settings.alpha}
        super().__init__(name, model, settings, "pgd-at", **steps)

    def adversarial(self, images: Tensor, labels: Tensor) -> Tensor:
        s = self.settings
        return pgd(
            self.model,
            images,
            labels,
            eps=s.eps,
            alpha=s.alpha,
            steps=s.steps,
            start=random_start(images, s.eps),
            autocast_dtype=s.dtype,
        )


class CommonLoop(Contender):
    """The loop of most repositories: ``backward()`` on the mean loss fills the gradients of all
    weights in every inner step, and they are thrown away.

    mode: in which the inner attack runs the model. Most repositories leave it in training mode;
    those of TRADES and MART put it into eval mode, as ironmoe does.
    """

    def __init__(self, name: str, model: nn.Module, settings: StepSettings, mode: str) -> None:
        super().__init__(name, model, settings)
        self.mode = mode

    def losses(self, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        adversarial = self._attack(images, labels)
        self.model.train()
        yield _outer_loss(self.model, adversarial, labels, self.settings.dtype)

    def adversarial(self, images: Tensor, labels: Tensor) -> Tensor | None:
        return self._attack(images, labels) if self.mode == "eval" else None

    def _attack(self, images: Tensor, labels: Tensor) -> Tensor:
        s = self.settings
        self.model.train(self.mode == "train")
        point = random_start(images, s.eps)
        for _ in range(s.steps):
            point.requires_grad_()
            with _autocast(images, s.dtype):
                loss = nn.functional.cross_entropy(self.model(point), labels)
            loss.backward()

            assert point.grad is not None
            point = point.detach() + s.alpha * point.grad.sign()
            point = torch.min(torch.max(point, images - s.eps), images + s.eps).clamp(0, 1)
        return point.detach()


class TorchattacksLoop(Contender):
    """``torchattacks.PGD`` in a loop, as its users train with it."""

    def __init__(self, name: str, model: nn.Module, settings: StepSettings) -> None:
        super().__init__(name, model, settings)
        library: Any = import_module(PEER)
        self.attack = library.PGD(
            self.model,
            eps=settings.eps,
            alpha=settings.alpha,
            steps=settings.steps,
            random_start=True,
        )

    def losses(self, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        adversarial = self.adversarial(images, labels)
        self.model.train()
        yield _outer_loss(self.model, adversarial, labels, self.settings.dtype)

    def adversarial(self, images: Tensor, labels: Tensor) -> Tensor:
        torch.manual_seed(START_SEED)
        with _autocast(images, self.settings.dtype):
            found: Tensor = self.attack(images, labels)
        return found.detach()


def has_peer() -> bool:
    """Whether torchattacks can be imported."""
    try:
        import_module(PEER)
    except ImportError:
        return False
    return True


def contenders(model: nn.Module, eps: float, dtype: torch.dtype | None) -> list[Contender]:
    """All ways to make a step that can be measured here; torchattacks' only where it is
    installed."""
    found: list[Contender] = []
    for steps in PGD_STEPS:
        settings = StepSettings(eps, default_alpha(eps, steps), steps, dtype)
        name = f"PGD-{steps}, {{}}".format
        found += [
            CommonLoop(name(COMMON), model, settings, "eval"),
            CommonLoop(name("training mode"), model, settings, "train"),
            OurPGD(name("ironmoe"), model, settings),
        ]
        if has_peer():
            found.append(TorchattacksLoop(name(PEER), model, settings))

    one_step = StepSettings(eps, eps, 1, dtype)
    return [
        *found,
        Ours("FGSM-RS", model, one_step, "fgsm-rs"),
        Ours("Free", model, one_step, "free"),
    ]


def _outer_loss(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype | None
) -> Tensor:
    with _autocast(images, dtype):
        loss = nn.functional.cross_entropy(model(images), labels)
    return loss + collect_aux_loss(model)


def _autocast(images: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(images.device.type, enabled=dtype is not None, dtype=dtype)
