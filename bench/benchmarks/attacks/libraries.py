"""The same attacks by other libraries, those that can be imported here. Each adapter gives (N,)
bool: which images held.

All libraries get the model as their users would hand it over: an nn.Module in eval mode whose
weights require grad, images in [0, 1].
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks import PGD, AutoAttack, evaluate

PEERS = {
    "torchattacks": "torchattacks",
    "foolbox": "foolbox",
    "adv-lib": "adv_lib.attacks",
    "official": "autoattack",
}
"""Library → the module to import."""
LibraryRun = Callable[[nn.Module, Tensor, Tensor], Tensor]


class PGDSettings(NamedTuple):
    """PGD in Linf with a fixed step and random starts. eps, alpha: in units of the pixel range."""

    eps: float
    alpha: float
    steps: int
    restarts: int
    batch_size: int


def pgd_runs(s: PGDSettings, dtype: torch.dtype | None = None) -> dict[str, LibraryRun]:
    """PGD by every library that can be imported, by name; ironmoe is first."""

    def ours(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack = PGD(model, s.eps, s.alpha, s.steps, restarts=s.restarts, attack_dtype=dtype)
        return (
            evaluate(model, (x, y), {"pgd": attack}, batch_size=s.batch_size, checks=False)
            .attacks["pgd"]
            .robust
        )

    def torchattacks(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        library = _library("torchattacks")
        one = [
            library.PGD(model, eps=s.eps, alpha=s.alpha, steps=s.steps, random_start=True)
            for _ in range(s.restarts)
        ]
        return _held(model, library.MultiAttack(one), x, y, s.batch_size)

    def foolbox(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        library = _library("foolbox")
        wrapped = library.PyTorchModel(model, bounds=(0, 1))
        attack = library.attacks.LinfPGD(
            abs_stepsize=s.alpha, steps=s.steps, random_start=True
        ).repeat(s.restarts)
        return _held(
            model, lambda x, y: attack(wrapped, x, y, epsilons=s.eps)[1], x, y, s.batch_size
        )

    def adv_lib(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        library = _library("adv_lib.attacks")

        def attack(x: Tensor, y: Tensor) -> Tensor:
            found: Tensor = library.pgd_linf(
                model,
                x,
                y,
                s.eps,
                steps=s.steps,
                random_init=True,
                restarts=s.restarts,
                loss_function="ce",
                absolute_step_size=s.alpha,
            )
            return found

        return _held(model, attack, x, y, s.batch_size)

    peers: dict[str, LibraryRun] = {
        "torchattacks": torchattacks,
        "foolbox": foolbox,
        "adv-lib": adv_lib,
    }
    return {"ironmoe": ours} | _importable(peers)


def autoattack_runs(
    norm: str, eps: float, batch_size: int, dtype: torch.dtype | None = None
) -> dict[str, LibraryRun]:
    """AutoAttack-standard by ironmoe, by the official code and by torchattacks, as far as they can
    be imported.

    Of torchattacks its four parts run at the official lengths, because its own AutoAttack makes 10
    steps where the official one makes 100. foolbox and adv-lib do not have the parts.
    """

    def ours(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack = AutoAttack(model, norm, eps, attack_dtype=dtype)
        return (
            evaluate(model, (x, y), {"aa": attack}, batch_size=batch_size, checks=False)
            .attacks["aa"]
            .robust
        )

    def official(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack = _library("autoattack").AutoAttack(
            model, norm=norm, eps=eps, seed=0, verbose=False, device=str(x.device)
        )
        return _held(
            model, lambda x, y: attack.run_standard_evaluation(x, y, bs=batch_size), x, y, len(x)
        )

    def torchattacks(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        library = _library("torchattacks")
        with torch.no_grad():
            classes = min(model(x[:1]).shape[1], 10)  # torchattacks goes through one target less
        common = {"norm": norm, "eps": eps}
        parts = [
            library.APGD(model, steps=100, loss="ce", **common),
            library.APGDT(model, steps=100, n_classes=classes, **common),
            library.FAB(model, steps=100, multi_targeted=True, n_classes=classes, **common),
            library.Square(model, n_queries=5000, resc_schedule=False, **common),
        ]
        return _held(model, library.MultiAttack(parts), x, y, batch_size)

    return {"ironmoe": ours} | _importable({"official": official, "torchattacks": torchattacks})


def _held(
    model: nn.Module,
    attack: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    batch_size: int,
) -> Tensor:
    """(N,) bool: the images that the model still classifies right when they are predicted again."""
    held = []
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        adversarial = attack(images, labels)
        with torch.no_grad():
            held.append(model(adversarial.detach()).argmax(1) == labels)
    return torch.cat(held)


def is_importable(name: str) -> bool:
    """Whether one of PEERS can be imported here."""
    try:
        _library(PEERS[name])
    except ImportError:
        return False
    return True


def _importable(runs: dict[str, LibraryRun]) -> dict[str, LibraryRun]:
    return {name: run for name, run in runs.items() if is_importable(name)}


def _library(name: str) -> Any:
    return import_module(name)
