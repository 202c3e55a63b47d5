"""Catastrophic overfitting (Wong et al., arXiv 2001.03994): the model learns to answer the one step
that it is trained against, and an attack of several steps finds it with no robustness at all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import comb
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ironmoe.attacks.losses import cross_entropy
from ironmoe.attacks.training.checks import check_batch, check_count
from ironmoe.attacks.training.guards.chance import against_chance
from ironmoe.attacks.training.inner.attacks import pgd
from ironmoe.attacks.training.inner.lent import constant, leaving_nothing, normal_tensors
from ironmoe.attacks.training.inner.loop import Inner, start_point

LIKELY = 0.01  # a difference that equal accuracies show more often than this is none
SEED = 0  # every check meets the same random starts
OWN = "the attack of the training"


class OverfittingVerdict(NamedTuple):
    """What a check found on the held-out images.

    tripped: the training has collapsed, or is about to
    message: what was found, on how many images
    fgsm, pgd: accuracy, in [0, 1], under the training's own attack, or under FGSM where the own one
        makes one step and is weaker; and under PGD. All are at the eps to which a ramp has come
    alignment: mean cosine of the loss's gradients at an image and beside it (2007.02617), in
        [−1, 1]; it falls when one step no longer knows the loss
    """

    tripped: bool
    message: str
    fgsm: float
    pgd: float
    alignment: float


class _Last(NamedTuple):
    """The last good check: which images (N,) were right under PGD at this eps."""

    right: Tensor
    eps: float


class _Seen(NamedTuple):
    """Which images are told right under the training's own attack, under FGSM, under PGD, and under
    PGD at the eps of the last good check, (N,) bool each; where nothing is compared with FGSM or
    with that check, what comes before stands there again. answers: (N,) for clean images; cosine:
    (N,) of the gradients at an image and beside it."""

    answers: Tensor
    own: Tensor
    fgsm: Tensor
    pgd: Tensor
    again: Tensor
    cosine: Tensor


class Attacking(Protocol):
    """What the guard needs of a training method."""

    model: nn.Module
    inner: Inner
    eps: float
    steps: int

    @property
    def strength(self) -> tuple[float, float]:
        """Radius and step length to which a ramp has come."""

    def attack_held_out(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, …) what its attack makes of these images now."""


class OverfittingGuard:
    """Tells after each epoch whether a training against one step collapses, and gives the weights
    of the last good check back.

    A check trips where accuracy under PGD fell by more than ``drop`` since the last good check, or,
    if the method attacks by one step, lies more than ``drop`` below accuracy under that attack, or
    under FGSM if that is stronger: a weak attack, of short steps or of another loss, is no
    collapse. A difference counts only if it is no chance: were both accuracies equal, it would be
    seen on these images in less than 1 % of cases (the one-sided exact test of McNemar). Ten images
    can hardly show a collapse; take 100 or more, of the training rows, held out.

    While a ramp lasts, the two attacks have the eps to which it has come, because what was not
    trained yet cannot have collapsed; the fall is that at the eps of the last good check. A check
    at which clean accuracy cannot be told from chance is none to fall from: one class for every
    image is right under any attack. The attack of ``Free`` is one step from the image. Random
    numbers go on as if there had been no check.

    Args:
        method: the training method, whose model is watched; ``AWP`` of one, too.
        images: (N, …) inside the method's bounds; labels: (N,) int64.
        steps: of PGD.
        drop: share of the images, in (0, 1).
        batch_size: images of a pass.
    """

    def __init__(
        self,
        method: Attacking,
        images: Tensor,
        labels: Tensor,
        *,
        steps: int = 10,
        drop: float = 0.2,
        batch_size: int = 200,
    ) -> None:
        if not isinstance(getattr(method, "inner", None), Inner):
            raise TypeError(f"method must be a TrainingMethod, got {type(method).__name__}")
        check_batch(nn.Identity(), images, labels)
        if labels.is_floating_point():
            raise TypeError(f"labels must be int64 classes (N,), got {labels.dtype}")
        check_count(steps=steps, batch_size=batch_size)
        if not 0 < drop < 1:
            raise ValueError(f"drop must be in (0, 1), got {drop}")
        self.method = method
        self.images = images.detach()
        self.labels = labels
        self.steps = steps
        self.drop = drop
        self.batch_size = batch_size
        self._last: _Last | None = None
        self._good: dict[str, Tensor] = {}

    def check(self) -> OverfittingVerdict:
        """Attack the held-out images; call it after each epoch. The host waits for the device."""
        own_numbers = _own_random_numbers(self.images.device)
        # An inner attack in training mode meets batch norm, which would take these images in.
        with normal_tensors(), own_numbers, leaving_nothing(self.method.model):
            parts = [self._look(*map(constant, batch)) for batch in self._batches()]
        seen = _Seen(*(torch.cat(part) for part in zip(*parts, strict=True)))

        name, one_step, known_as = f"PGD-{self.steps}", seen.own, OWN
        reasons = []
        if self.method.steps == 1:  # attacks of several steps on other losses may be weaker, too
            if seen.fgsm.sum() < seen.own.sum():
                one_step, known_as = seen.fgsm, "FGSM"
            reasons.append(self._difference(one_step, seen.pgd, known_as, name))
        # a fall without such a difference is that of a training that diverges
        what = "catastrophic overfitting" if any(reasons) else "robustness is lost"
        if self._last is not None:
            before = self._last.right.to(seen.again)
            reasons.append(
                self._difference(before, seen.again, f"{name} at the last good check", name)
            )
        reasons = [f"{what}: {reason}" for reason in reasons if reason]

        if not reasons:
            self._good = {n: value.clone() for n, value in _tensors(self.method.model).items()}
            if against_chance(seen.answers, self.labels).learned:
                self._last = _Last(seen.pgd, self.method.strength[0])
        rates = float(one_step.float().mean()), float(seen.pgd.float().mean())
        alignment = float(seen.cosine.nanmean().nan_to_num(0.0))  # a gradient of 0 has no direction
        numbers = (
            f"of {len(one_step)} held-out images {rates[0]:.1%} are told right under {known_as}, "
            f"{rates[1]:.1%} under {name}; gradient alignment {alignment:.2f}"
        )
        return OverfittingVerdict(bool(reasons), "; ".join([*reasons, numbers]), *rates, alignment)

    def restore(self) -> None:
        """Put the weights and buffers of the last good check into the model, in place. The
        optimizer keeps its moments: begin with a new one, and with a random start, a shorter step
        or more steps, else it collapses again.

        RuntimeError: no check was good yet.
        """
        if not self._good:
            raise RuntimeError("restore needs a check that was good, got none yet")
        with torch.no_grad():
            for name, value in _tensors(self.method.model).items():
                value.copy_(self._good[name])

    def state_dict(self) -> dict[str, Tensor]:
        """What the next check is compared with, and the weights of the last good one; copies."""
        state = {f"good.{name}": value.clone() for name, value in self._good.items()}
        if self._last is not None:
            state["last_pgd"] = self._last.right.clone()
            state["last_eps"] = torch.tensor(self._last.eps, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state_dict`` was called. ValueError: it had other images."""
        right = state.get("last_pgd")
        if right is not None and len(right) != len(self.images):
            raise ValueError(
                f"state must belong to these {len(self.images)} images, got {len(right)}"
            )
        self._last = None if right is None else _Last(right, float(state["last_eps"]))
        self._good = {
            name.removeprefix("good."): value.clone()
            for name, value in state.items()
            if name.startswith("good.")
        }

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = self.images.split(self.batch_size), self.labels.split(self.batch_size)
        yield from zip(*parts, strict=True)

    def _look(self, images: Tensor, labels: Tensor) -> "_Seen":
        """What a check finds on some images (B, …), (B,)."""
        inner, eps = _plain(self.method.inner), self.method.strength[0]
        own = self.method.attack_held_out(images, labels)
        points = [own, own]
        if self.method.steps == 1:
            points[1] = pgd(inner, images, labels, eps=eps, alpha=eps, steps=1, start="clean")
        radii = {eps} if self._last is None else {eps, self._last.eps}
        attacked = {
            radius: pgd(inner, images, labels, eps=radius, steps=self.steps)
            for radius in sorted(radii)
        }
        points += [attacked[eps], attacked[eps if self._last is None else self._last.eps]]
        beside = start_point(inner.around(images, eps), "uniform")

        with inner.running(images):
            here, there = (
                inner.gradient(place, labels, cross_entropy).flatten(1).double()
                for place in (images, beside)
            )
            answers = inner.logits(images).argmax(1)
            right = [inner.logits(point).argmax(1) == labels for point in points]
        cosine = nn.functional.cosine_similarity(here, there, eps=0)
        return _Seen(answers, *right, cosine)  # type: ignore[call-arg]

    def _difference(self, high: Tensor, low: Tensor, above: str, below: str) -> str:
        """In words, where fewer images are right in ``low`` (N,) than in ``high`` by more than
        ``drop``, and not by chance; else ""."""
        lost = int((high & ~low).sum())
        won = int((low & ~high).sum())
        share = (lost - won) / len(high)
        likely = chance(lost, won)
        if share <= self.drop or likely >= LIKELY:
            return ""
        return (
            f"accuracy under {below} lies {100 * share:.0f} points below that under {above} "
            f"(p = {likely:.1g})"
        )


def chance(lost: int, won: int) -> float:
    """How likely at least ``lost`` of ``lost + won`` images are lost where both are equally
    likely: the one-sided p-value of McNemar's exact test."""
    trials = lost + won
    return sum(comb(trials, count) for count in range(lost, trials + 1)) / 2**trials


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Inside the block random numbers begin at a fixed seed."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        yield


def _plain(inner: Inner) -> Inner:
    """The same model, norm and box in eval mode, with free routing."""
    settings = inner.asked.settings | {"routing": None}
    settings["autocast_dtype"] = settings.pop("attack_dtype")
    return Inner(inner.model, norm=inner.ball.norm, bounds=inner.bounds, **settings)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, the model's own memory."""
    return {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
