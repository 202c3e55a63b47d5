"""PGD on a whole V-MoE, in images a second: the attack as users call it, and its bare steps
eagerly, as a CUDA graph and compiled."""

from collections.abc import Callable
from copy import copy
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ironmoe.attacks import PGD
from ironmoe.bench.benchmarks.gpu.run_log import LONGEST_REASON, Pen, first_line
from ironmoe.bench.benchmarks.passes import captured
from ironmoe.bench.common.dtypes import dtype_name
from ironmoe.bench.common.radii import USUAL_EPS
from ironmoe.bench.common.timing import OutOfTime, samples_in_turns, time_limit
from ironmoe.kernels.attack_step import linf_step
from ironmoe.moe import VMoE, freeze_weights

STEPS = 10
RUNS = 5
# The ways that are timed.
AS_USERS_CALL_IT = "ironmoe.attacks.PGD"
EAGER = "steps, eager"
GRAPHED = "steps, CUDA graph"
COMPILED = "steps, torch.compile"


class Setting(NamedTuple):
    """Which model is attacked, and on how many images."""

    name: str
    model: Callable[[], VMoE]
    images: int


def _small() -> VMoE:
    return VMoE(
        image_size=16,
        patch_size=8,
        dim=16,
        depth=1,
        heads=2,
        mlp_dim=32,
        num_classes=10,
        moe_layers=(0,),
        num_experts=4,
    )


FULL_SIZE = Setting("V-MoE-B/16", partial(VMoE.from_config, "V-MoE-B/16"), 128)
REHEARSAL_SIZE = Setting("toy V-MoE", _small, 8)


class Steps:
    """STEPS bare steps of PGD from one random start: forward, loss, image gradient, ``linf_step``.
    Nothing looks at a result in between."""

    def __init__(
        self, model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> None:
        self.model, self.labels = model, labels
        self.low, self.high = (images - USUAL_EPS).clamp_min(0), (images + USUAL_EPS).clamp_max(1)
        self.alpha = torch.full((len(images),), 2.5 * USUAL_EPS / STEPS, device=images.device)
        self.start = self.low + (self.high - self.low) * torch.rand_like(images)
        self.point, self.image = self.start.clone(), self.start.to(dtype, copy=True)
        self.image.requires_grad_()

    def reset(self) -> None:
        with torch.no_grad():
            self.point.copy_(self.start)
            self.image.copy_(self.start)

    def step(self) -> None:
        """One step. It works in place, so that a CUDA graph can hold it."""
        loss = F.cross_entropy(self.model(self.image).float(), self.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [self.image])
        point, image = linf_step(
            self.point, gradient, self.low, self.high, self.alpha, image_dtype=self.image.dtype
        )
        with torch.no_grad():
            self.point.copy_(point)
            self.image.copy_(image)

    def eager(self) -> Tensor:
        """The images (N, C, H, W) after STEPS steps."""
        return self._all(self.step)

    def graphed(self) -> Callable[[], Tensor]:
        """The same steps, each a replay of one captured step."""
        return partial(self._all, captured(self.step))

    def compiled(self) -> Callable[[], Tensor]:
        """The same steps with a compiled model."""
        # a rehearsal compiles no C++
        backend = "inductor" if self.start.is_cuda else "aot_eager"
        model: Callable[[Tensor], Tensor] = torch.compile(
            self.model, backend=backend, fullgraph=True
        )
        again = copy(self)
        again.model = model
        return again.eager

    def _all(self, step: Callable[[], Any]) -> Tensor:
        self.reset()
        for _ in range(STEPS):
            step()
        return self.point.clone()


def measure_attack(
    setting: Setting, dtype: torch.dtype, device: torch.device, left: Callable[[], float], pen: Pen
) -> bool:
    """Write a row for each way that works here. Its adversarial images are compared with those of
    the eager steps.

    Returns:
        True if there was time for all.
    """
    model, images, labels = _prepare(setting, device)
    low_precision = setting.model().to(device, dtype).eval().requires_grad_(False)
    low_precision.load_state_dict(model.state_dict())
    steps = Steps(low_precision, images, labels, dtype)

    def attack() -> Callable[[], Tensor]:
        search_dtype = None if dtype == torch.float32 else dtype
        pgd = PGD(model, eps=USUAL_EPS, steps=STEPS, early_stop=False, attack_dtype=search_dtype)
        return lambda: pgd(images, labels)

    ways: dict[str, Callable[[], Callable[[], Tensor]]] = {
        EAGER: lambda: steps.eager,
        AS_USERS_CALL_IT: attack,
        GRAPHED: steps.graphed,
        COMPILED: steps.compiled,
    }

    expected: Tensor | None = None
    for way, prepare in ways.items():
        if way in pen.done or (way == GRAPHED and device.type != "cuda"):
            continue

        pen.begin(way, "ironmoe")
        row = {
            "model": setting.name,
            "way": way,
            "dtype": dtype_name(dtype),
            "images": len(images),
            "steps": STEPS,
        }

        try:
            with time_limit(left()), freeze_weights(model):
                found, figures = _timed(prepare(), len(images), device)
        except OutOfTime:
            return False
        except Exception as error:  # the way does not work here: its row says so
            pen.finish(way, attack=[row | {"why": first_line(error)[:LONGEST_REASON]}])
            continue

        if way == EAGER:
            expected = found
        if way in (GRAPHED, COMPILED):
            expected = steps.eager() if expected is None else expected
            figures["same_pixels"] = (found == expected).double().mean().item()
        pen.finish(way, attack=[row | figures])

    return True


def _prepare(setting: Setting, device: torch.device) -> tuple[VMoE, Tensor, Tensor]:
    """The model, images, and its own predictions as labels: images that are wrong already would not
    be attacked."""
    model = setting.model().to(device).eval()
    # a head of zeros, as training starts with, gives no gradient
    nn.init.normal_(model.head.weight, std=0.02)
    images = torch.rand(
        setting.images, model.channels, model.image_size, model.image_size, device=device
    )
    with torch.no_grad():
        labels = model(images).argmax(1)
    return model, images, labels


def _timed(
    run: Callable[[], Tensor], images: int, device: torch.device
) -> tuple[Tensor, dict[str, Any]]:
    """Call ``run`` once, which compiles everything, then RUNS times.

    What counts is how long the host waits for the images, as a user does.

    Returns:
        (what it returns, figures from the median)
    """
    found: list[Tensor] = []

    def finished() -> None:
        found[:] = [run()]
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    # without a warm-up, so that the first sample is the call that compiles
    samples = samples_in_turns({"attack": finished}, device, RUNS + 1, warmup=0)["attack"]
    first, *later = (sample.host_ms / 1e3 for sample in samples)
    seconds = median(later)

    return found[0], {
        "ms": 1e3 * seconds,
        "images_per_s": images / seconds,
        "first_call_s": first,
        "runs": RUNS,
    }
