"""Trains the small V-MoE of ``ironmoe.moe.example`` and writes its file.

Run ``python tests/support/make_trained_example.py`` where the package is installed with
scikit-learn. Training magnifies rounding, so another processor makes another file: the one in the
repository was made in a minute on one core of an Intel Xeon with torch 2.13.0, seed 0.
"""

from pathlib import Path

import numpy as np
import torch

from ironmoe.bench.common.train import Recipe, train
from ironmoe.bench.data.built_in import digits
from ironmoe.bench.data.split import stratified
from ironmoe.moe import VMoE
from ironmoe.moe.example import ARGUMENTS

FILE = Path(__file__).parents[2] / "moe" / "example.npz"
RECIPE = Recipe(epochs=40, batch_size=64)
SEED = 0


def main():
    data = digits()
    images, labels = torch.from_numpy(data.images), data.labels
    kept, held_out = stratified(labels, data.names)

    torch.manual_seed(SEED)
    model = VMoE(**ARGUMENTS)
    train(model, images[kept], labels[kept], RECIPE, seed=SEED, shifts=False)

    arrays = {f"model.{name}": value.half().numpy() for name, value in model.state_dict().items()}
    arrays["images"] = (16 * images[held_out]).round().byte().numpy()
    arrays["labels"] = labels[held_out].byte().numpy()
    np.savez_compressed(FILE, **arrays)

    with torch.no_grad():
        right = model(images[held_out]).argmax(1) == labels[held_out]
    print(f"{FILE}: {FILE.stat().st_size:,} bytes, {right.sum()} of {len(right)} right")


if __name__ == "__main__":
    main()
