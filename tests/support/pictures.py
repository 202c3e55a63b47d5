"""Pictures for tests: smooth ones, PNG files byte by byte, and sets of a few images."""

import io
import struct
import zlib
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import multiprocessing

from ironmoe.attacks.data import Item, UnreadableImage


def noise(height, width, channels=3, seed=0):
    """A picture (height, width) of independent pixels, mode RGB or L."""
    shape = (height, width, 3) if channels == 3 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def encoded(picture, kind, **options):
    """What a file of this kind holds."""
    held = io.BytesIO()
    picture.save(held, kind, **options)
    return held.getvalue()


def png(width, height, bits, colour_type, rows, chunks=()):
    """A PNG file of raw rows, each without its filter byte."""
    raw = zlib.compress(b"".join(b"\0" + row for row in rows))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", raw), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


@contextmanager
def started_by(method):
    """Worker processes begin by "fork" or "spawn"."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


class Numbers:
    """A set of small uint8 images, in each of which every pixel is its number; those in ``bad``
    cannot be read. ``asked`` has the numbers that this process read."""

    name, names, fingerprint, notes = "numbers", None, "numbers", []

    def __init__(self, count, bad=(), classes=3, shape=(1, 4, 4), odd=()):
        self.count = count
        self.bad = bad
        self.shape = shape
        self.odd = odd
        self.labels = torch.arange(count) % classes
        self.asked = []

    def __len__(self):
        return self.count

    def read(self, number, channels):
        self.asked.append(number)
        if number in self.bad:
            raise UnreadableImage(f"number {number} is damaged")
        shape = (1, 5, 5) if number in self.odd else self.shape
        return Item(torch.full(shape, number % 256, dtype=torch.uint8), int(self.labels[number]))

    def where(self, number):
        return f"number {number}"


class Joined:
    """Several sets, one after another."""

    name, names, fingerprint, notes = "joined", None, "joined", []

    def __init__(self, sets):
        self.sets = sets
        self.rows = [(each, number) for each in sets for number in range(len(each))]
        self.labels = torch.tensor([each.read(number, 3).label for each, number in self.rows])

    def __len__(self):
        return len(self.rows)

    def read(self, number, channels):
        images, row = self.rows[number]
        return images.read(row, channels)

    def where(self, number):
        images, row = self.rows[number]
        return images.where(row)
