"""How much is measured: radii, and how many images and steps each measurement gets."""

from typing import Any, NamedTuple

from ironmoe.bench.common.radii import ascending_radii
from ironmoe.bench.common.user_error import UserError


class Budget(NamedTuple):
    """Radii are in units of 1/255 of the pixel range, in Linf.

    radii: of the robust curve, ascending; radius: of what is measured at one radius; clean_images:
    of which clean accuracy is measured, with interventions, too; images: that meet the PGD curve;
    routed_images: that meet attacks that know routing, and interventions after PGD;
    targeted_images: that meet APGD; paper_images: that
    meet the paper's attack; local_images: whose derivatives and least radii are looked at;
    swap_images: whose nearest swaps and steepest secants are looked for.

    steps: of PGD; apgd_steps: of APGD, at each target of APGD-T, too; targets: of APGD-T;
    slope_steps: of searches for the steepest secant; least_steps, least_targets: of FAB;
    certified_images: that get a certificate; samples: noisy copies of each; sigma: of their noise,
    in units of the pixel range.
    """

    radii: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0)
    radius: float = 8.0
    clean_images: int = 1000
    images: int = 400
    routed_images: int = 150
    targeted_images: int = 50
    paper_images: int = 50
    local_images: int = 50
    swap_images: int = 25
    steps: int = 20
    apgd_steps: int = 20
    targets: int = 9
    slope_steps: int = 10
    least_steps: int = 40
    least_targets: int = 3
    certified_images: int = 100
    samples: int = 1000
    sigma: float = 0.25
    seed: int = 0
    batch_size: int = 200

    def part(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The settings of these names, for JSON."""
        return {name: getattr(self, name) for name in names}


def at_most(budget: Budget, images: int) -> Budget:
    """The budget with ``images`` for the PGD curve, and no more for any other measurement."""
    counts = {name: getattr(budget, name) for name in budget._fields if name.endswith("_images")}
    fewer = {name: min(count, images) for name, count in counts.items()}
    return budget._replace(images=images, **fewer)


def with_radii(budget: Budget, eps: str | None) -> Budget:
    """The budget with the radii that ``--eps`` lists; the third of them, or the last of fewer, is
    that of what is measured at one radius.

    Raises:
        UserError: they are no radii above 0.
    """
    if eps is None:
        return budget
    radii = ascending_radii(eps, "Linf")
    if radii[0] == 0:
        raise UserError(f"--eps must be above 0, got {eps!r}; clean accuracy is measured anyway")
    return budget._replace(radii=radii, radius=radii[min(2, len(radii) - 1)])


def robust_budget(budget: Budget, trained_at: float) -> Budget:
    """The budget for models that were trained at this radius: multiples of it in place of the
    radii of ordinary models, on the flank of whose curve nothing is left to tell."""
    shares = (0.5, 1.0, 1.5, 2.0)
    return budget._replace(
        radii=tuple(share * trained_at for share in shares), radius=float(trained_at)
    )


def quick_budget(budget: Budget) -> Budget:
    """The part of it that a first look needs."""
    return budget._replace(
        images=min(budget.images, 200),
        routed_images=min(budget.routed_images, 100),
        local_images=min(budget.local_images, 40),
        swap_images=min(budget.swap_images, 10),
    )
