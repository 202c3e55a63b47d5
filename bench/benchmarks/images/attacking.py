"""PGD on images that stream: what of the time the model takes, and what waiting takes."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks import PGD, Progress, evaluate
from ironmoe.attacks.data import ImageStream
from ironmoe.attacks.data.files import ImageFiles
from ironmoe.attacks.engine.attacked_model import AttackedModel
from ironmoe.bench.benchmarks.images.memory import Row
from ironmoe.bench.benchmarks.images.vit_s import make_model
from ironmoe.bench.common.durations import left_in_words
from ironmoe.bench.common.files import write_json
from ironmoe.bench.common.machine.origin import origin_digest
from ironmoe.bench.common.radii import from_255
from ironmoe.bench.models.load import load_model

SAY_SECONDS = 60.0
SAVE_SECONDS = 5.0


def attacked(
    source: str,
    model: str,
    files: list[str],
    workers: int,
    batch_size: int,
    dtype: str,
    folder: str,
    name: str,
) -> Row:
    """PGD-10 at 4/255 on the images, each with the class that the model gives it as its label.

    It says about every minute how far it is. After a kill the same call goes on: images that are
    decided and the seconds spent on them are in ``folder/begun-…/name``, in
    a folder of this machine and these versions.

    Returns:
        seconds; model_share: of them spent in passes of the model, forward and backward;
        waited_share: spent waiting for images once the first had come; images_per_second; killed:
        how often it was; robust_accuracy in percent.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(None, make_model(model, source, Path(folder)), device)
    assert loaded.pipeline is not None
    begun = Path(folder) / f"begun-{origin_digest()}" / name
    labels = _labels(loaded.model, loaded.pipeline, files, workers, device, begun / "labels.json")

    stream = _stream(files, labels, loaded.pipeline, workers)
    attack_dtype = torch.bfloat16 if dtype == "bfloat16" else None
    attack = PGD(loaded.model, from_255(4), steps=10, attack_dtype=attack_dtype)
    spent = Spent(attack.attacked_model, stream, device, begun / "seconds.json")
    report = evaluate(
        loaded.model,
        stream,
        {"pgd": attack},
        batch_size=batch_size,
        checks=False,
        journal=begun / "journal",
        on_progress=lambda progress: spent.note(progress, name),
    )
    seconds = spent.so_far()
    shutil.rmtree(begun)
    return {
        "source": source,
        "model": model,
        "images": len(files),
        "workers": workers,
        "batch_size": batch_size,
        "dtype": dtype,
        "seconds": seconds["all"],
        "killed": seconds["killed"],
        "images_per_second": len(files) / seconds["all"],
        "model_share": seconds["model"] / seconds["all"],
        "waited_share": seconds["waited"] / seconds["all"],
        "robust_accuracy": 100 * report.attacks["pgd"].robust_accuracy.value,
    }


class Spent:
    """Seconds of an attack and of its parts, also over kills, of which each loses a few."""

    def __init__(
        self, model: AttackedModel, stream: ImageStream, device: torch.device, file: Path
    ) -> None:
        self.file = file
        self.stream = stream
        self.before = {"all": 0.0, "model": 0.0, "waited": 0.0, "killed": 0}
        if file.exists():
            self.before = json.loads(file.read_text())
            self.before["killed"] += 1

        self.in_model = 0.0
        for name in ("ask", "judge"):
            setattr(model, name, self._timed(getattr(model, name), device))
        self.began = time.perf_counter()
        self.said = self.began
        self.saved = self.began
        write_json(file, self.so_far())

    def so_far(self) -> dict[str, Any]:
        """all, model, waited in seconds, and how often it was killed."""
        now = {
            "all": time.perf_counter() - self.began,
            "model": self.in_model,
            "waited": self.stream.waited,
            "killed": 0,
        }
        return {part: self.before[part] + new for part, new in now.items()}

    def note(self, progress: Progress, name: str) -> None:
        """Save the seconds, and say how far the attack is, each if it is time to."""
        now = time.perf_counter()
        if now - self.saved >= SAVE_SECONDS:
            write_json(self.file, self.so_far())
            self.saved = now
        if now - self.said >= SAY_SECONDS:
            ends, expected = progress.seconds_left, progress.seconds_expected
            wait = "" if ends is None else f", {left_in_words(ends, expected)}"
            print(f"{name}: {progress.decided} of {progress.total} images{wait}", flush=True)
            self.said = now

    def _timed(self, plain: Any, device: torch.device) -> Any:
        def timed(*args: Any, **options: Any) -> Tensor:
            began = time.perf_counter()
            answer: Tensor = plain(*args, **options)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.in_model += time.perf_counter() - began
            return answer

        return timed


def _stream(files: list[str], labels: list[int], pipeline: Any, workers: int) -> ImageStream:
    names = [Path(file).name for file in files]
    images = ImageFiles("jpegs", Path(files[0]).parent, names, labels, None)
    return ImageStream(images, pipeline, workers=workers)


@torch.no_grad()
def _labels(
    model: nn.Module,
    pipeline: Any,
    files: list[str],
    workers: int,
    device: torch.device,
    kept: Path,
) -> list[int]:
    """The classes that the model gives the images, kept in a file."""
    found: list[int] = []
    if kept.exists():
        found = json.loads(kept.read_text())
        return found
    for pixels, _ in _stream(files, [0] * len(files), pipeline, workers):
        found += model(pixels.to(device)).argmax(1).tolist()

    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, found)
    return found
