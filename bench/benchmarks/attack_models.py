"""The models that attacks are measured on: a dense ViT, a V-MoE, one trained on adversarial images,
and one of a wider trunk."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ironmoe.attacks import PGD
from ironmoe.bench.common.checkpoints import architecture, load_checkpoint, save_checkpoint
from ironmoe.bench.common.data import ImageData
from ironmoe.bench.common.run_folder import write_atomically
from ironmoe.moe import VMoE, collect_aux_loss

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
    """Name → model in eval mode. What ``folder`` holds already is not trained again.

    The robust one is trained on PGD-4 images within ``eps`` (Madry et al., arXiv 1706.06083).
    """
    models = {}
    rows = data.split()[0]
    for name in names:
        file = folder / (
            f"{name.lower().replace(' ', '-')}-eps{eps:g}-epochs{epochs}-"
            f"{data.checksum[:8]}.safetensors"
        )
        if not file.exists():
            torch.manual_seed(0)
            arguments = architecture(
                "ViT" if name == "ViT" else "V-MoE", tuple(data.images.shape[1:]), len(data.classes)
            )
            arguments |= WIDTHS if name == WIDE else {}
            model = VMoE(**arguments)
            radius = eps if name.startswith("robust") else 0.0
            _fit(
                model,
                data.images[rows],
                data.labels[rows],
                radius,
                epochs,
                partial(on_epoch, name),
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, save_checkpoint(model, arguments, {"name": name, "eps": radius}))
        models[name] = load_checkpoint(file, torch.device("cpu"))[0]
    return models


def _fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    epochs: int,
    on_epoch: Callable[[int], None],
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05, fused=True)
    steps = epochs * -(-len(images) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.2
    )
    for epoch in range(epochs):
        for rows in torch.randperm(
            len(images), generator=torch.Generator().manual_seed(epoch)
        ).split(100):
            x, y = images[rows], labels[rows]
            # The radius grows over the first half: at full strength from the start small models
            # learn nothing.
            radius = eps * min(1.0, 2 * (epoch + 1) / epochs)
            if eps:
                x = PGD(model, radius, steps=ADVERSARIAL_STEPS, early_stop=False, seed=epoch)(x, y)
            model.train()
            optimizer.zero_grad(set_to_none=True)
            (nn.functional.cross_entropy(model(x), y) + collect_aux_loss(model)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        on_epoch(epoch + 1)
    model.eval()
