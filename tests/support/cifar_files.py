"""Small files in the format of CIFAR's "python version", as Python 2 and Python 3 write them."""

import pickle
import struct

import numpy as np

PLACES = {"cifar10": "cifar-10-batches-py/test_batch", "cifar100": "cifar-100-python/test"}
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}


def pixels(count, seed=0):
    """(count, 3072) uint8: ten pictures under noise, one after another."""
    generator = np.random.default_rng(seed)
    pictures = generator.integers(60, 196, (10, 3072))
    noise = generator.integers(-20, 21, (count, 3072))
    return (pictures[np.arange(count) % 10] + noise).astype(np.uint8)


def write(folder, name, data, labels, *, protocol=2):
    """A test set below ``folder``, written by Python 3; returns its path."""
    entries = {"data": data, LABELS[name]: labels, "batch_label": "testing batch 1 of 1"}
    if name == "cifar100":
        entries["coarse_labels"] = [label // 5 for label in labels]
    path = folder / PLACES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(entries, protocol=protocol))
    return path


def write_as_python_2(folder, name, data, labels):
    """The same as Python 2 and the numpy of 2009 wrote it, opcode by opcode."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value):
        return b"I%d\n" % value

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t"
    array += text(b"b") + b"tR(" + number(1) + b"(" + b"".join(map(number, data.shape)) + b"t"
    array += b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR"
    array += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    array += b"I00\n" + text(data.tobytes()) + b"tb"
    entries = text(b"data") + array
    entries += text(LABELS[name].encode()) + b"(" + b"".join(map(number, labels)) + b"l"

    path = folder / PLACES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"(" + entries + b"d.")
    return path
