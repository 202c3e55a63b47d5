"""MLPs of a model that share what they hold: experts in their place must not untie it."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

from torch import nn

from ironmoe.moe.layers.mlp_layouts import layout_of


def check_sharing(model: nn.Module, tower: Sequence[str], chosen: Sequence[str]) -> None:
    """ValueError that names two places which would no longer be one.

    Args:
        tower: paths of the MLPs of all blocks; chosen: of those that get experts. The same module
            may lie at several of them, if all are chosen.
    """
    paths = {module: path for path, module in model.named_modules()}
    # where each module and each parameter lies; a module at two paths is one place
    places: dict[int, list[str]] = {}
    for module, path in paths.items():
        for name, held in chain(module._modules.items(), module._parameters.items()):
            places.setdefault(id(held), []).append(f"{path}.{name}" if path else name)

    def place(path: str) -> str:
        parent, _, name = path.rpartition(".")
        known = paths[model.get_submodule(parent)]
        return f"{known}.{name}" if known else name

    replaced = {place(path) for path in chosen}
    for path in chosen:
        mlp = model.get_submodule(path)
        elsewhere = [p for p in places.get(id(mlp), []) if p not in replaced]
        others = [p for p in tower if p not in chosen and model.get_submodule(p) is mlp]
        layout = layout_of(mlp)
        if others or (elsewhere and layout and not layout.parts):
            raise ValueError(
                f"layers must name all blocks that share one MLP or none of them, got {path} "
                f"without {(others or elsewhere)[0]}, which is the same module"
            )
        for part in _parts(mlp):
            first, *more = places[id(part)]
            if more:
                raise ValueError(
                    f"model must not share a part of an MLP, because experts would untie it, got "
                    f"{first} and {more[0]}, which are the same. Share the whole MLP module, or "
                    "give each a copy"
                )


def _parts(mlp: nn.Module) -> Iterator[nn.Module | nn.Parameter]:
    """The linear layers of an MLP, what lies around them in it, and their parameters."""
    layout = layout_of(mlp)
    for layer in (*layout.first, layout.second) if layout else ():
        names = accumulate(layer.split("."), lambda outer, name: f"{outer}.{name}")
        yield from (mlp.get_submodule(name) for name in names)
        yield from mlp.get_submodule(layer).parameters()
