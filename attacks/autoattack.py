"""AutoAttack: the ensemble that robust accuracies are reported with (Croce & Hein, arXiv
2003.01690; L1: arXiv 2103.01208)."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ironmoe.attacks.aliases.declared import Only, declare
from ironmoe.attacks.attack import Attack
from ironmoe.attacks.balls.abilities import SparseBall
from ironmoe.attacks.balls.ball import Ball, Bounds, ball_of
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.evaluation.evaluate import evaluate
from ironmoe.attacks.extra import Extra
from ironmoe.attacks.methods.apgd import APGD
from ironmoe.attacks.methods.fab import FAB
from ironmoe.attacks.methods.square import Square
from ironmoe.attacks.registry import register_attack
from ironmoe.attacks.standard.evaluation import (
    NAME,
    clean_accuracy,
    final_images,
    standard_report,
)
from ironmoe.attacks.standard.log import Log
from ironmoe.attacks.standard.parts import HasParts
from ironmoe.attacks.standard.versions import RAND_EOT, VERSIONS, recipes


@register_attack(
    summary='APGD, FAB and Square one after another; `version` is `"standard"`, `"plus"`, '
    '`"rand"` or `"custom"`.',
    source="2003.01690",
    names={
        "autoattack": {},
        "autoattack-plus": {"version": "plus"},
        "autoattack-rand": {"version": "rand", "eot": 20},
    },
)
class AutoAttack(HasParts, Attack):
    """Attacks one after another, each on the images that held against the ones before.

    The composition, the schedules and the numbers of iterations are those of the official code:

    - "standard": APGD on the cross-entropy; APGD on the targeted DLR, 9 targets; targeted FAB, 9
      targets; Square, 5000 queries. In L1: APGD with 5 restarts and three radii, 5 targets of it
      with three radii.
    - "plus": APGD on cross-entropy and on DLR, FAB, 5 restarts each; Square; the targeted two.
    - "rand", for random models: APGD on cross-entropy and DLR, each gradient the mean of 20.
    - "custom": ``attacks_to_run``, by the names above, with the settings of "plus".

    It differs from the official code in this: random numbers are keyed by example, not drawn by
    batch; a misclassified image leaves at once; a proposal of Square that changes nothing costs no
    pass; the last point of an APGD run counts; Square's windows may touch the last row and column
    (in L1 on MNIST, Square alone then breaks about 1 % of images fewer; elsewhere as many or more).

    Args (beyond those of ``Attack``):
        version: as above.
        attacks_to_run: the names of the attacks, for "custom".
        verbose: print what ``run_standard_evaluation`` finds, in the official words: the initial
            accuracy first, then how far it is, and at the end the robust accuracy after each
            attack, the largest perturbation, and what looks wrong.
        log_path: a file to which the same lines are appended; None: none.

    ``apgd``, ``apgd_targeted``, ``fab`` and ``square`` have the settings of the attacks, as in
    ``adversary.apgd.n_restarts = 2``. They count until ``set_version``, which is the same as
    setting ``version``. ``attacks_to_run`` may be set, too, whatever the version.
    """

    read_late = frozenset({"name", "attacked_model", "attacks_to_run", "verbose", "log_path"})
    takes_groups = False
    needs_classes = "goes through wrong classes as targets"

    aliases = declare(
        epsilon="eps",
        n_classes=Only(
            tuple(range(2, 11)),
            "adversary.apgd_targeted.n_target_classes and adversary.fab.n_target_classes say how "
            "many wrong classes are targets, 9 as in the official code",
        ),
    )

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        version: str = "standard",
        *,
        attacks_to_run: Sequence[str] = (),
        bounds: Bounds = (0.0, 1.0),
        seed: int | None = 0,
        verbose: bool = False,
        log_path: Path | str | None = None,
        **options: Any,
    ) -> None:
        if version not in (*VERSIONS, "custom"):
            raise ValueError(f"version must be one of {(*VERSIONS, 'custom')}, got {version!r}")
        if (version == "custom") != bool(attacks_to_run):
            raise ValueError(
                "attacks_to_run must be given for version 'custom' and for no other, got "
                f"{list(attacks_to_run)}"
            )

        if version == "rand":
            options = {"eot": RAND_EOT} | options
        super().__init__(model, eps, norm=norm, bounds=bounds, seed=seed, **options)
        if self.targeted:
            raise ValueError("targeted must be False: AutoAttack goes through targets of its own")

        if log_path is not None and not Path(log_path).absolute().parent.is_dir():
            raise ValueError(f"log_path must lie in a folder that exists, got {str(log_path)!r}")

        self.version = version
        self.verbose = verbose
        self.log_path = log_path
        self.attacks_to_run = list(attacks_to_run or VERSIONS[version])
        self.stage_settings: dict[str, dict[str, Any]] = {}
        self._options: dict[str, Any] = {"norm": norm, "bounds": bounds} | options
        self._check_names(self.attacks_to_run)

    def make_again(self, changed: Mapping[str, Any]) -> None:
        if "version" in changed:
            self.set_version(changed["version"])
            return
        names = self.attacks_to_run if self.version == "custom" else ()
        now = {"version": self.version, "attacks_to_run": names, "eot": self.eot}
        super().make_again(now | dict(changed))

    def take_over(self, before: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
        super().take_over(before, changed)
        kept = {name: before[name] for name in ("attacks_to_run", "stage_settings")}
        vars(self).update(kept)
        self.stages  # noqa: B018  ValueError: what was set does not go with what is changed

    @classmethod
    def takes_ball(cls, ball: type[Ball]) -> bool:
        """AutoAttack takes the norms that all of its parts take."""
        return all(part.takes_ball(ball) for part in (APGD, FAB, Square))

    def __repr__(self) -> str:
        which = f"version={self.version!r}"
        if self.version == "custom":
            which = f"attacks_to_run={self.attacks_to_run}"
        return f"AutoAttack({self.norm}, eps={self.eps_text}, {which}, seed={self.seed})"

    @property
    def stages(self) -> Sequence[Attack]:
        """The attacks of ``attacks_to_run``. They are made anew when that list, or a setting, has
        changed."""
        if self.__dict__.get("_made") != self._wanted:
            self._check_names(self.attacks_to_run)
            stages = [self.stage(name) for name in self.attacks_to_run]
            self._take_stages(stages)
        return self._stages

    def stage(self, name: str) -> Attack:
        """A new attack of this name, with the settings of the version and what was set since."""
        kind, settings = self._recipes[name]
        chosen = self._options | {"seed": self.seed} | settings | self.stage_settings.get(name, {})
        with warnings.catch_warnings():  # this attack has said it of the same eps
            warnings.filterwarnings("ignore", "eps=.* in the unit of the pixels")
            warnings.filterwarnings("ignore", "normalize has the mean")
            attack = kind(self.model, eps=self.eps, **chosen)
        attack.name = name
        attack.attacked_model = self.attacked_model
        return attack

    def _take_stages(self, stages: Sequence[Attack]) -> None:
        """Let these be the stages until something changes."""
        self._made = self._wanted
        self._stages = list(stages)

    @property
    def _wanted(self) -> tuple[Any, ...]:
        """What the stages depend on, of what can change."""
        settings = (self.version, self.seed, repr(self.stage_settings), id(self.attacked_model))
        return (*self.attacks_to_run, *settings)

    def _check_names(self, names: Sequence[str]) -> None:
        """ValueError: names of no attack, or FAB with a routing mode that adds to the loss."""
        known = tuple(self._recipes)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"attacks_to_run must be among {known}, got {unknown}")
        has_fab = not {"fab", "fab-t"}.isdisjoint(names)
        if has_fab and self.attacked_model.routing.adds_term:
            raise ValueError(
                "routing must not add to the loss where FAB runs, got "
                f"{self.attacked_model.routing} with {list(names)}: use "
                'version="custom" and attacks_to_run without "fab" and "fab-t"'
            )

    @property
    def _recipes(self) -> dict[str, tuple[type[Attack], dict[str, Any]]]:
        return recipes(self.version, sparse=issubclass(ball_of(self.norm), SparseBall))

    def set_version(self, version: str) -> None:
        """Take the attacks and settings of "standard", "plus" or "rand", in place of what was set
        before."""
        if version not in VERSIONS:
            raise ValueError(f"version must be one of {tuple(VERSIONS)}, got {version!r}")
        names = list(VERSIONS[version])
        self._check_names(names)
        eot = RAND_EOT if version == "rand" else 1
        vars(self).update(version=version, attacks_to_run=names, eot=eot)
        self._options["eot"] = eot
        self.stage_settings.clear()

    def run_standard_evaluation(
        self,
        x: Tensor,
        y: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: Path | str | None = None,
        *,
        extra: Extra | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The call of the official code.

        Args:
            x: (N, …) images in ``bounds``.
            y: (N,) int64 labels.
            bs: images in the active batch.
            return_labels: also return the classes that the model gives the images, (N,) int64.
            state_path: a folder in which results are kept at once (``journal`` of ``evaluate``), so
                that the same call goes on after a kill. All images are returned, also those that
                were attacked before it.
            extra: further inputs of the model, as in ``run``.

        Returns:
            (N, …) adversarial images, the clean one where none was found; with ``return_labels``
            (images, classes).
        """
        report = standard_report(
            self,
            (x, y, extra),
            bs=bs,
            log=self.log(bs),
            state_path=state_path,
            keep_adversarial=True,
        )
        summary = report.attacks[NAME]
        adversarial = final_images(summary, x)
        return (adversarial, summary.prediction.to(x.device)) if return_labels else adversarial

    def run_standard_evaluation_individual(
        self,
        x: Tensor,
        y: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        *,
        extra: Extra | None = None,
    ) -> dict[str, Any]:
        """Each attack by itself on all images: name → adversarial images, or (images, classes)."""
        # Each runs the very attack that is a stage here, so that settings made on it count.
        options = self._options | {"norm": self.norm, "seed": self.seed}
        singles = {
            stage.name: AutoAttack(
                self.model,
                eps=self.eps,
                version="custom",
                attacks_to_run=[stage.name],
                **options,
            )
            for stage in self.stages
        }
        for stage, single in zip(self.stages, singles.values(), strict=True):
            single._take_stages([stage])

        report = evaluate(self.model, (x, y, extra), singles, batch_size=bs, keep_adversarial=True)
        log = self.log(bs)
        found: dict[str, Any] = {}
        for name, summary in report.attacks.items():
            images = final_images(summary, x)
            found[name] = (images, summary.prediction.to(x.device)) if return_labels else images
            log.line(f"robust accuracy by {name.upper()}: {summary.robust_accuracy}")
        return found

    def clean_accuracy(
        self, x: Tensor, y: Tensor, bs: int = 250, *, extra: Extra | None = None
    ) -> float:
        """The share of images (N, …) that the model gives their labels (N,)."""
        return clean_accuracy(self, x, y, extra, bs=bs)

    def log(self, every: int) -> Log:
        """Where an evaluation says what it finds, and how far it is after ``every`` images."""
        return Log(self.version, self.verbose, self.log_path, every=every)

    def start(self, attempts: Attempts) -> None:
        raise NotImplementedError("AutoAttack runs through its stages")

    def advance(
        self, attempts: Attempts, logits: Tensor, loss: Tensor, grad: Tensor | None
    ) -> None:
        raise NotImplementedError("AutoAttack runs through its stages")
