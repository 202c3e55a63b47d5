"""Where an attack looks for adversarial examples: the norm, its radii and the box."""

from torch import Tensor

from ironmoe.attacks.balls.ball import NORMS, Ball, ball_at, ball_of
from ironmoe.attacks.balls.checked import checked_bounds, checked_eps, shown
from ironmoe.attacks.balls.elements import (
    Bound,
    Bounds,
    Region,
    SharedElements,
    is_by_image,
    largest,
    region_of,
)
from ironmoe.attacks.engine.attempts import Attempts


class _Norms:
    """The names of the registered norms that a class of attacks takes, looked up when asked."""

    def __get__(self, attack: "SearchSpace | None", kind: "type[SearchSpace]") -> tuple[str, ...]:
        return tuple(name for name, ball in NORMS.items() if kind.takes_ball(ball))


class SearchSpace:
    """The part of an attack that knows its norm, eps and bounds.

    Args:
        eps, norm, bounds: as in ``Attack``.

    Raises:
        ValueError, TypeError: a norm, radius or box that this attack cannot take.
    """

    norms = _Norms()
    """The names of the norms that the attack takes: those that keep the promises that it ``needs``.
    It refuses every other norm."""

    needs: type[Ball] | tuple[type[Ball], ...] = Ball
    """The attack takes a norm whose ball is one of these classes. It must ask the ball for nothing
    that all of them do not promise."""

    needs_a_box = False
    """The attack works only within finite ``bounds``, and refuses others."""

    inside = True
    """Every point of the search lies in the ball; else eps may be infinite."""

    def __init__(self, eps: Bound, norm: str, bounds: Bounds) -> None:
        if norm not in self.norms:
            raise ValueError(f"norm must be one of {self.norms}, got {norm!r}")

        needs_faces = self.needs_a_box or ball_of(norm).needs_finite_bounds
        who = f"{type(self).__name__} in {norm}" if needs_faces else None
        self.bounds = checked_bounds(bounds, finite_for=who)
        self.eps = checked_eps(eps, infinite=not self.inside)
        self.norm = norm
        self._elements = SharedElements()

    @property
    def largest_eps(self) -> float:
        """The largest radius of any element of any image."""
        return largest(self.eps)

    @property
    def eps_text(self) -> str:
        """eps as it is printed; of a tensor the shape and the largest element."""
        return shown(self.eps)

    @classmethod
    def takes_ball(cls, ball: type[Ball]) -> bool:
        """Whether the attack knows what to do in this norm."""
        return issubclass(ball, cls.needs)

    def region(self, images: Tensor) -> Region:
        """What eps and bounds mean for a batch of images (N, …).

        Raises:
            ValueError: a tensor that does not go with the images or with the norm.
        """
        return self._region((len(images), *images.shape[1:]))

    def check_alike(self, images: Tensor, count: int | None) -> None:
        """ValueError: eps or bounds that are not the same for all images of a data set.

        Args:
            images: some of them, (n, …).
            count: how many there are; None: that is not known.
        """
        shape = tuple(images.shape[1:])
        for name, value in (("eps", self.eps), *(("bounds", bound) for bound in self.bounds)):
            if is_by_image(value, shape):
                raise ValueError(
                    f"{name} must be the same for all images of an evaluation, a number or a "
                    f"tensor that broadcasts to an image {shape}, got {shown(value)}"
                )
        self._region((1 if count is None else count, *shape))

    def ball(self, attempts: Attempts) -> Ball:
        """Where the adversarial examples of these attempts may lie."""
        ball = ball_of(self.norm)
        kept = {name: attempts[name] for name in ball.kept if name in attempts}
        shared = self._elements.of(self.eps, self.bounds, attempts["clean"])
        return ball_at(ball, attempts, shared, kept)

    def _region(self, shape: tuple[int, ...]) -> Region:
        region = region_of(self.eps, self.bounds, shape)
        if region.by_element:
            ball_of(self.norm).scaled()
        return region
