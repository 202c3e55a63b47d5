"""``FILE.pt2``: a program of torch.export."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

import ironmoe.kernels  # noqa: F401, its operators may be in the program
from ironmoe.bench.common.errors import told
from ironmoe.bench.common.query import read_known
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.loaded import LoadedModel, facts_of
from ironmoe.bench.models.registry import Source, register_files
from ironmoe.moe.checkpoints.errors import CheckpointError

HOW = (
    "torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"
)


class Program(nn.Module):
    """A module of an exported program, whose mode was fixed when it was exported."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Any:
        return self.module(images)

    def train(self, mode: bool = True) -> "Program":
        """Nothing but a note of the mode: the program refuses to change its own."""
        self.training = mode
        return self


@register_files(".pt2", form="FILE.pt2 (torch.export)")
def load_exported(source: Source) -> LoadedModel:
    """The program of ``torch.export.save``, from images to logits. The size of the images is the
    one that it was exported for.

    Raises:
        CheckpointError: there is no such file, it holds no program of one image batch, or the
            program was exported for one number of images.
    """
    read_known(source.spec, source.query, {})
    path = Path(source.path)
    if not path.is_file():
        raise CheckpointError(f"{source} must be a file, and there is none at {path.absolute()}")
    try:
        program = torch.export.load(path)
        if source.device.type != "cpu":
            program = move_to_device_pass(program, source.device)
    except Exception as error:
        raise CheckpointError(
            f"{source} holds no program of torch.export that can be read here: {told(error)}"
        ) from error

    batch, *shape = _input_shape(source, program)
    if isinstance(batch, int):
        raise CheckpointError(
            f"{source} was exported for {batch} images at a time; export it for any number: {HOW}"
        )
    fixed = tuple(int(edge) for edge in shape if isinstance(edge, int))
    return LoadedModel(
        Classifier(Program(program.module())),
        path.stem,
        fixed if len(fixed) == 3 else None,
        None,
        facts_of(path.stem),
    )


def _input_shape(source: Source, program: Any) -> list[Any]:
    """(B, C, H, W) of the program's only input: whole numbers where they are fixed."""
    names = set(program.graph_signature.user_inputs)
    inputs = [
        node.meta.get("val")
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    ]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4:
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else each for each in inputs]
        raise CheckpointError(
            f"{source} must take images (B, C, H, W) as its only input, got inputs {shapes}"
        )
    return list(inputs[0].shape)
