"""What the engine asks of an attack. The engine knows this protocol and no attack.

``ironmoe.attacks.attack.Attack`` fulfils it for every class that derives from it, and gives the
attributes their defaults. What an attribute means is written here alone.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from torch import Tensor

from ironmoe.attacks.balls.ball import Ball
from ironmoe.attacks.balls.elements import Bounds, Region
from ironmoe.attacks.engine.attacked_model import Answer, AttackedModel, Model
from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.goals.goal import Goal

Keeps = Literal["first", "best", "last"]
"""Which point of an attempt becomes its candidate, the point that is predicted again at the end."""


class Search(Protocol):
    """An attack as a state machine: it sets the next point, and the engine asks the model."""

    name: str
    """Reports and error messages call the attack by this name."""

    eps: float | Tensor
    """This radius holds for images that come to the engine without a radius of their own stage."""

    goal: Goal
    """It says what a success is, and which outputs and labels there are."""

    bounds: Bounds
    """Every pixel of an image lies between these two numbers."""

    eot: int
    """The search asks the model so many times for each answer, because it may be random."""

    seed: int
    """The engine derives the random key of every attempt from this seed."""

    attacked_model: AttackedModel
    """The engine asks this object for every prediction, and adds up the passes that it counts."""

    coupled_by_model: bool
    """The images of one group change each other's predictions, so one attempt must fool them all at
    the same time."""

    gradient: bool
    """The engine asks for the gradient of the loss with every query."""

    inside: bool
    """Every point of the search lies in ball and box except for rounding, so the engine need not
    measure its distance before it counts the point as a success."""

    keeps: Keeps
    """"first": the engine ends an attempt at its first success. "best": the engine lets it run to
    its end, and keeps the point with the best ``score``, successes before all others. "last": the
    engine keeps the last point, whatever came before it."""

    takes_groups: bool
    """The attack may run on images that influence each other; the engine refuses it otherwise."""

    starts_clean: bool
    """The first query of an attempt is about the clean image, which the engine never keeps as the
    best point."""

    attacks_wrong: bool
    """The engine also attacks images that the model misclassifies without any attack."""

    exhaustive: bool
    """The engine makes all attempts, also after a success, and keeps the success with the best
    ``score``."""

    restarts: int
    """The engine makes this many attempts at each image, and at each target if there are any."""

    targets: int
    """The engine names this many wrong classes as targets, one after another; 0 means none."""

    max_queries: int
    """An attempt that runs to its end asks the model this often."""

    @property
    def model(self) -> Model:
        """The user's model."""

    @property
    def stages(self) -> Sequence["Search"]:
        """The attacks that an image goes through until one succeeds."""

    def images_per_unit(self, batch_size: int) -> int:
        """How many images must be attacked together in batches of this size."""

    def check_grid(self, images: Tensor) -> None:
        """ValueError: images that do not lie on the grid of the attack, if it has one."""

    def region(self, images: Tensor) -> Region:
        """What radii and bounds mean for a batch of images."""

    def counted(self, attempts: Attempts, point: Tensor) -> Tensor:
        """(R, …) what counts where the search is at ``point``: the point itself, or one near it on
        a grid."""

    def final(self, attempts: Attempts, point: Tensor) -> Tensor:
        """(R, …) what is predicted at the end: ``point``, or one near it in the ball."""

    def distance(self, attempts: Attempts, point: Tensor) -> Tensor:
        """(R,) float64 distance of what counts at ``point`` from the image."""

    def ball(self, attempts: Attempts) -> Ball:
        """Where the adversarial examples of these attempts may lie."""

    def start(self, attempts: Attempts) -> None:
        """Set the first point of new attempts, and whatever else the attack remembers."""

    def ask(self, attempts: Attempts, want_grad: bool) -> Answer:
        """Ask the model about ``attempts["point"]``."""

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        """Use the answer: set the next point, and mark the attempts for which it is the last."""

    def passes_per_query(self, count: int, device: str) -> int:
        """How many forward passes ``ask`` makes for each of ``count`` attempts."""

    def queries_left(self, attempts: Attempts) -> Tensor:
        """(R,) int64, how many more queries are made at most for these attempts."""

    def wants_gradient(self, attempts: Attempts) -> Tensor | None:
        """(R,) bool: these attempts need the gradient now; None: all, if ``gradient`` is set."""

    def score(self, attempts: Attempts, loss: Tensor) -> Tensor:
        """(R,) The engine prefers points with a higher score."""

    def fooled(self, logits: Tensor, attempts: Mapping[str, Tensor]) -> Tensor:
        """(R,) bool: the model gives the answer that the attack is after, wherever the point
        lies."""
