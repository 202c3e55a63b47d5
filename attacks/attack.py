"""What every attack shares: its settings, and the few methods that a new attack has to write.

This file stands above the engine, which knows attacks only by the protocol ``engine.search``.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.aliases.calls import FamiliarCalls, unknown_arguments
from ironmoe.attacks.aliases.everywhere import EVERYWHERE
from ironmoe.attacks.balls.checked import warn_of_normalize
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.engine.attacked_model import Answer, AttackedModel, Model, Normalize
from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.engine.coupling import images_coupled, images_per_unit
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.engine.search import Keeps
from ironmoe.attacks.extra import Extra
from ironmoe.attacks.goals.goal import Goal
from ironmoe.attacks.goals.labels import PLAIN, Targeted, chosen_goal, needs_logits
from ironmoe.attacks.result import AttackResult
from ironmoe.attacks.run import run_attack
from ironmoe.attacks.space import SearchSpace


class Attack(SearchSpace, FamiliarCalls):
    """``attack(images, labels)`` returns adversarial images, ``attack.run(images, labels)`` an
    AttackResult.

    The model is any callable from images (B, …) to logits (B, C). While an attack runs, an
    nn.Module is in eval mode with frozen weights; all of its state comes back afterwards. Attacks
    work under ``no_grad`` and ``inference_mode``. The model sees images in other orders and numbers
    than they came, and some again and again: what belongs to an image must be ``extra`` of ``run``.

    Args:
        model: takes images in ``bounds``.
        eps: radius in the units of ``bounds``: a number; a tensor (N,) with one radius an example;
            or a tensor that broadcasts to an image, with a radius an element, 0 where an element
            may not move. With the rank of the images and N first it is one such tensor an image.
            In Linf each element stays within its eps; in L2 and L1 the norm of (change / eps) is
            at most 1.
        norm: the name of a registered norm that the attack takes; ``norms`` lists them.
        bounds: lowest and highest valid pixel: two numbers, or tensors of such shapes as eps has.
        seed: whatever is random depends on (seed, example index, attempt, step) alone, and not on
            batches. None: a seed is drawn from the clock; ``attack.seed`` says which.
        targeted: ``labels`` are the classes to reach, not the ones to leave: the same as
            ``goal=Targeted()``.
        goal: what a success is and what the search raises (``ironmoe.attacks.goals``); None: the
            model names another class than the label.
        eot: ask the model this many times for each gradient and take the mean (Athalye et al.,
            arXiv 1802.00420): for random models.
        normalize: (mean, std) of the channels, if the model does not normalise its images itself.
            eps stays in units of ``bounds``.
        logits_fn: takes the logits out of the model's output. Outputs of Hugging Face models, with
            ``.logits``, do not need it.
        attack_dtype: run the search under autocast in this dtype; predictions that count stay in
            full precision.
        routing: what the search does to routing (``ironmoe.attacks.engine.routing_mode``);
            predictions that count leave it free.

        levels: pixels take so many evenly spaced values between ``bounds`` alone, as 256 in a PNG;
            the images must lie on this grid. The search itself is continuous; what the model is
            asked, judged by and returned lies on the grid. None: any value.
        device: where the model takes its images: that of its weights, which is the default. For a
            model without weights images are sent there.

    An argument may be set later under its name, as in ``attack.eps = 0.1``: it counts as if the
    attack had been made with it. What cannot be set is an error that says so.

    A subclass writes ``start``, ``advance`` and, if it has one, ``loss``; everything else is done
    for it. It sees nothing but attempts side by side (``ironmoe.attacks.engine.attempts``), each at
    a step of its own, which come and go while it runs. Most derive from ``FixedRadiusAttack`` or
    ``LeastDistanceAttack`` below.
    """

    aliases = EVERYWHERE
    read_late = frozenset({"name", "max_queries", "attacks_wrong", "attacked_model"})

    needs_classes: str | None = None
    """Why the attack takes no goal but ``Untargeted`` and ``Targeted``; None: it takes any."""

    # The engine reads the attributes from here on. ``engine.search.Search`` says what each means;
    # the two base classes below say which go together.
    max_queries: int  # every attack must set it
    restarts = 1
    targets = 0
    gradient = True
    keeps: Keeps = "first"
    starts_clean = False
    exhaustive = False
    attacks_wrong = False
    takes_groups = True

    def __init_subclass__(cls) -> None:
        """Refuse the former name of a method: uncalled, it would make costs wrong."""
        super().__init_subclass__()
        if "questions" in vars(cls):
            raise TypeError(
                f"{cls.__name__} must have the method passes_per_query, got questions, its former "
                "name"
            )

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        *,
        norm: str = "Linf",
        bounds: Bounds = (0.0, 1.0),
        seed: int | None = 0,
        targeted: bool = False,
        eot: int = 1,
        normalize: Normalize | None = None,
        logits_fn: Callable[[Any], Tensor] | None = None,
        attack_dtype: torch.dtype | None = None,
        routing: RoutingMode | None = None,
        goal: Goal | None = None,
        levels: int | None = None,
        device: torch.device | str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise unknown_arguments(type(self), list(unknown))
        why_classes = self.needs_classes
        if self.targets and why_classes is None:
            why_classes = "goes through classes as targets of its own"
        self.goal = chosen_goal(goal, targeted, type(self).__name__, why_classes)
        self.attacked_model = AttackedModel(
            model, normalize, logits_fn, attack_dtype, routing, self.goal, device
        )
        super().__init__(eps, norm, bounds, levels)
        warn_of_normalize(self.attacked_model.normalize, self.bounds)
        if not isinstance(seed, int | None):
            raise TypeError(f"seed must be an int, or None, got {seed!r}")
        if eot < 1:
            raise ValueError(f"eot must be at least 1, got {eot}")
        if isinstance(self.goal, Targeted) and self.targets:
            raise ValueError(
                f"targeted=True does not go with {type(self).__name__}, which goes through "
                "targets of its own"
            )

        self.name = type(self).__name__
        self.seed = time.time_ns() % 2**31 if seed is None else seed
        self.targeted = isinstance(self.goal, Targeted)
        self.eot = eot

        self.coupled_by_model = images_coupled(model)

    @property
    def model(self) -> Model:
        return self.attacked_model.model

    @property
    def coupled_by_model_or_loss(self) -> bool:
        """Whether the search of one image depends on others. Images that the model couples change
        each other's predictions; those that only a routing mode couples share a loss."""
        return self.coupled_by_model or self.attacked_model.routing.coupled_by_loss

    @property
    def search(self) -> str:
        """How the search runs the model, where that is not the plain way: a part of the names of
        attacks in a list."""
        routing = self.attacked_model.routing
        parts = {
            "targeted": self.targeted or None,
            "goal": None if type(self.goal) in PLAIN else self.goal,
            "eot": self.eot if self.eot > 1 else None,
            "attack_dtype": self.attacked_model.attack_dtype,
            "levels": self.levels,
            "routing": None if type(routing) is RoutingMode else routing,
        }
        return ", ".join(f"{name}={value}" for name, value in parts.items() if value is not None)

    def make_again(self, changed: Mapping[str, Any]) -> None:
        super().make_again({"seed": self.seed} | dict(changed))  # one of the clock stays, too

    def take_over(self, before: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
        made_now = self.attacked_model
        super().take_over(before, changed)
        if not {"goal", "targeted"}.isdisjoint(changed):
            self.attacked_model = made_now  # the other one has the goal of before

    def chosen_settings(self) -> dict[str, Any]:
        """What the user chose, by the names of the constructor's arguments; a journal goes on only
        with the same. An attack that keeps an argument under another name overrides this method,
        but for ``loss_of``: a method has the name ``loss``."""
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        if type(self.goal) in PLAIN:
            del public["goal"]  # ``targeted`` says it
        if self.levels is None:
            del public["levels"]  # older journals do not know it
        if "loss_of" in public:
            public["loss"] = public.pop("loss_of")
        return public

    def images_per_unit(self, batch_size: int) -> int:
        """How many images must be attacked together in batches of this size."""
        group = images_per_unit(self.model, batch_size)
        return (
            max(batch_size // group, 1) * group
            if self.attacked_model.routing.coupled_by_loss
            else group
        )

    @property
    def classes_needed(self) -> int:
        """With fewer classes the attack is not what its name says."""
        return max(2, self.targets + 1)

    @property
    def stages(self) -> Sequence["Attack"]:
        """The attacks that an image goes through until one succeeds."""
        return (self,)

    def run(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor | None = None,
        *,
        extra: Extra | None = None,
        passes: int | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            images: (N, …) floating point, finite, inside ``bounds``.
            labels: (N,) int64, 0 … C − 1; for another goal what it takes, (N, …).
            indices: (N,) the examples' numbers in their data set, for their random numbers; by
                default 0 … N − 1.
            extra: further inputs of the model, one entry an example: a tensor (N, …), a tuple of
                them for arguments by position, or a dict of them for arguments by keyword. They
                travel with their example. Images come to the model in other orders and numbers than
                here, so a model must not look them up elsewhere.
            passes: how often the model is asked for each prediction that counts, clean and
                adversarial: 1, or an even number of at least 16 for a random model. None: 1; 64 for
                ``eot`` above 1, and for a model that is seen to give two answers to one image.

        Raises:
            ValueError, TypeError: an input outside the above, or a model whose logits are not
                floats of shape (N, C), or not finite.
        """
        return run_attack(self, images, labels, indices, extra=extra, passes=passes)

    @abstractmethod
    def start(self, attempts: Attempts) -> None:
        """Set ``attempts["point"]``, which the model is asked about first, and add what else the
        attack remembers: tensors (R, …), one entry an attempt."""

    def loss(self, logits: Tensor, attempts: Attempts) -> Tensor:
        """(R,) what the attack raises, of logits (R, C); differentiable if ``gradient``. A targeted
        attack lowers it."""
        return attempts["key"].new_zeros(len(logits), dtype=torch.float32)

    def signed(self, raised: Tensor) -> Tensor:
        """What ``loss`` has to return where this is what the search should raise, as a goal's
        losses are."""
        return -raised if self.targeted else raised

    def passes_per_query(self, count: int, device: str) -> int:
        """How many forward passes ``ask`` makes for each of ``count`` attempts."""
        return self.eot

    def queries_left(self, attempts: Attempts) -> Tensor:
        """(R,) int64, how many more queries are made at most for these attempts."""
        return (self.max_queries - attempts["queries"]).clamp_min(0)

    def ask(self, attempts: Attempts, want_grad: bool) -> Answer:
        """The model's answer to what counts at ``attempts["point"]``."""
        if self.levels is not None:  # the gradient passes the rounding as if it were not there
            attempts = attempts | {"point": self.counted(attempts, attempts["point"])}
        return self.attacked_model.ask(attempts, self.objective, want_grad, self.eot)

    def objective(self, logits: Tensor, attempts: Attempts) -> Tensor:
        """(R,) the loss that the engine takes gradients of. A targeted attack lowers its ``loss``,
        so here it has the opposite sign. TypeError: a loss of labels, where logits are needed."""
        if not logits.is_floating_point() and type(self).loss is not Attack.loss:
            raise needs_logits(self.name)
        loss = self.loss(logits, attempts)
        return -loss if self.targeted else loss

    @abstractmethod
    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        """Use the answer to ``attempts["point"]``: set the next point, and ``finished`` where it is
        the last, whose answer is not needed.

        logits (R, C), loss (R,) and grad (R, …) have one entry an attempt, and attempts may be at
        different steps. Nothing here may wait for the device: no branch on values, no ``nonzero``.
        Attempts that are over are among them, too; what becomes of them does not matter.
        """

    def score(self, attempts: Attempts, loss: Tensor) -> Tensor:
        """(R,) how good the points are. An attack that ``keeps`` the "best" takes the highest score
        of its successes, or of all its points if none is a success."""
        return loss

    def wants_gradient(self, attempts: Attempts) -> Tensor | None:
        """(R,) bool: these attempts need the gradient now; None: all, if ``gradient`` is set. The
        engine asks only on CPU, where reading the answer costs nothing."""
        return None

    def fooled(self, logits: Tensor, attempts: Mapping[str, Tensor]) -> Tensor:
        """(R,) bool: the model gives the answer that the attack is after, wherever the point is."""
        return self.goal.reached(logits, attempts["label"])


class FixedRadiusAttack(Attack):
    """An attack that searches inside the ball of radius eps: PGD, APGD, Square and their relatives.

    Every point lies in the ball, so the engine need not measure distances during the search. Any
    adversarial point in the ball will do, so no other attempt is needed after a success.
    """

    inside = True
    exhaustive = False


class LeastDistanceAttack(Attack):
    """An attack that looks for the nearest adversarial point: FAB, DeepFool, CW.

    Its points may lie outside the ball, so the engine measures their distance, and eps may be
    infinite. It moves each image by itself, so it does not take images that influence each other.
    """

    inside = False
    takes_groups = False
    attacks_wrong = False
