"""Results of a demo by hand, without a training."""

from ironmoe.attacks import Proportion
from ironmoe.bench.reports.model_results import ModelResults

TOTAL = 100
PASSED = {"name": "zero gradients", "tripped": False, "value": 0.0, "message": "None stands still."}
TRIPPED = {
    "name": "loss still rising at the end",
    "tripped": True,
    "value": 0.5,
    "message": "More.",
}
UNSEEN = {"name": "Square", "tripped": False, "value": 0.0, "message": "Not looked at: no Square."}
STATES = ((PASSED, "passed"), (TRIPPED, "tripped"), (UNSEEN, "not looked at"))
BY_STATE = {state: flag | {"state": state} for flag, state in STATES}


def model_results(name, clean, robust, *, checks=("passed",), chance=0.1, eps=None, layers=()):
    """``ModelResults`` of as many seeds as ``clean`` has entries.

    clean: of TOTAL images, how many are right, for each seed; robust: for each seed, the same at
    each eps; layers: names of MoE layers.
    """
    eps = eps or [2.0, 8.0, 24.0][: len(robust[0])]
    runs = []
    for seed, (right, held) in enumerate(zip(clean, robust, strict=True)):
        attacks = [
            {
                "eps_255": at,
                "robust": Proportion(count, TOTAL).as_dict(),
                "seconds": 1.0,
                "forwards": 10,
                "backwards": 10,
            }
            for at, count in zip(eps, held, strict=True)
        ]
        routed = {"change": 0.25, "load_clean": [0.5, 0.5], "load_adversarial": [0.75, 0.25]}
        routing = [
            {"eps_255": at, "images": 50, "layers": dict.fromkeys(layers, routed)} for at in eps
        ]
        runs.append(
            {
                "flops": 1_000_000,
                "parameters": 2000,
                "seed": seed,
                "train_seconds": 1.0,
                "clean": Proportion(right, TOTAL).as_dict(),
                "chance": chance,
                "classes": 10,
                "images_per_second": 100.0,
                "attacks": attacks,
                "checks": [BY_STATE[state] for state in checks],
                "routing": routing if layers else [],
            }
        )
    return ModelResults(name, runs)
