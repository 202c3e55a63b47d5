"""The models that attacks are measured on: a dense ViT, a V-MoE, a V-MoE that was trained on
adversarial images, and a wide V-MoE."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks.training import PGDAT
from ironmoe.bench.common.checkpoints import architecture, load_checkpoint, save_checkpoint
from ironmoe.bench.common.files import slug, write_atomically
from ironmoe.bench.common.train import Adversary, Recipe, TrainingProgress, one_cycle, train
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.moe import VMoE

MODELS = ("ViT", "V-MoE", "robust V-MoE")
# as wide as a V-MoE-S: matrix products take most of its time, as in models of real size
WIDE = "wide V-MoE"
WIDTHS = {"dim": 384, "heads": 6, "mlp_dim": 1536, "expert_dim": 768}
ADVERSARIAL_STEPS = 4


def trained_models(
    names: Sequence[str],
    data: ImageData,
    eps: float,
    epochs: int,
    folder: Path,
    on_epoch: Callable[[str, int], None],
) -> dict[str, VMoE]:
    """The models by name, in eval mode. A model that ``folder`` holds already is not trained again.

    The robust one is trained on PGD-4 images within ``eps``, in units of the pixel range (Madry et
    al., arXiv 1706.06083).
    """
    models = {}
    for name in names:
        file = model_file(name, data, eps, epochs, folder)
        if not file.exists():
            _train_to(file, name, data, eps, epochs, partial(on_epoch, name))
        models[name] = load_checkpoint(file, torch.device("cpu"))[0]
    return models


def model_file(name: str, data: ImageData, eps: float, epochs: int, folder: Path) -> Path:
    """Where the trained model of this name is, or will be."""
    # "pgd-at": robust models in files without it were trained by a loop that left images clean
    trained = f"pgd-at-eps{eps:g}" if name.startswith("robust") else f"eps{eps:g}"
    end = f"{trained}-epochs{epochs}-{data.checksum[:8]}.safetensors"
    return folder / f"{slug(name)}-{end}"


def passes_of_training(name: str) -> int:
    """That an image costs in an epoch, forward and backward."""
    return 1 + ADVERSARIAL_STEPS * name.startswith("robust")


def new_model(name: str, data: ImageData) -> VMoE:
    """The model of this name before its training."""
    torch.manual_seed(0)
    return VMoE(**_arguments(name, data))


def _arguments(name: str, data: ImageData) -> dict[str, Any]:
    arguments = architecture(
        "ViT" if name == "ViT" else "V-MoE", tuple(data.images.shape[1:]), len(data.classes)
    )
    return arguments | WIDTHS if name == WIDE else arguments


def _train_to(
    file: Path,
    name: str,
    data: ImageData,
    eps: float,
    epochs: int,
    on_epoch: Callable[[int], None],
) -> None:
    """Train the model of this name and write its checkpoint."""
    model = new_model(name, data)
    rows, _ = data.split()
    radius = eps if name.startswith("robust") else 0.0
    file.parent.mkdir(parents=True, exist_ok=True)
    state = file.with_suffix(".training")  # an interrupted training goes on from its last epoch
    images, labels = data.images[rows], data.labels[rows]
    _fit(model, images, labels, radius, epochs, on_epoch, state_file=state)

    write_atomically(
        file, save_checkpoint(model, _arguments(name, data), {"name": name, "eps": radius})
    )
    state.unlink(missing_ok=True)


def _fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    epochs: int,
    on_epoch: Callable[[int], None],
    *,
    state_file: Path | None = None,
) -> None:
    """Train on the images, or, if ``eps`` is above 0, on adversarial ones within it."""
    recipe = Recipe(epochs=epochs)
    steps_per_epoch = -(-len(images) // recipe.batch_size)

    def show(progress: TrainingProgress) -> None:
        epoch, rest = divmod(progress.step, steps_per_epoch)
        if rest == 0:
            on_epoch(epoch)

    train(
        model,
        images,
        labels,
        recipe,
        seed=0,
        schedule=one_cycle(warmup=0.2),
        shifts=False,
        adversary=_adversary(model, eps, epochs, steps_per_epoch) if eps else None,
        state_file=state_file,
        on_step=show,
    )


def _adversary(model: nn.Module, eps: float, epochs: int, steps_per_epoch: int) -> Adversary:
    """PGD on every image, of a radius that grows up to ``eps`` over the first half of the
    batches."""
    ramp = epochs * steps_per_epoch // 2
    method = PGDAT(model, eps, steps=ADVERSARIAL_STEPS, alpha=eps / 2, ramp_steps=ramp)

    def attacked(x: Tensor, y: Tensor, epoch: int) -> Tensor:
        # a training that goes on begins with an epoch
        method.step = max(method.step, epoch * steps_per_epoch)
        points = method.adversarial(x, y)
        method.step += 1
        return points

    return attacked
