"""Short numbers for what must not change between two runs."""

import hashlib
import inspect
import io
import itertools
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from pickletools import genops
from typing import Any

import torch
from torch import Tensor, fx, nn

from ironmoe.attacks.user_warning import warn_user
from ironmoe.moe.sharded import give_back_gathered, printed_without_fsdp, whole_tensor

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
NOT_ITS_OWN = re.compile(r"[./]?___torch_mangle_\d+|\bcuda:\d+\b|\bcpu\b")
"""In the text of TorchScript: what tells classes of one name apart, and devices."""


def checksum(values: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's values, going on from ``start``."""
    return zlib.crc32(
        values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), start
    )


def checksums_of(images: Tensor, labels: Tensor, *extra: Tensor) -> list[int]:
    """CRC-32 of each image (N, …) with its label (N, …) and its further inputs (N, …):
    ``checksum(image, checksum(label))``, and so on."""
    rows = [
        part.detach().cpu().contiguous().unsqueeze(1).flatten(1).view(torch.uint8).numpy()
        for part in (labels, images, *extra)
    ]
    return [
        reduce(lambda start, part: zlib.crc32(part.data, start), parts, 0)
        for parts in zip(*rows, strict=True)
    ]


def model_digest(model: Any) -> str:
    """SHA-256 of what tells a model from others; of a callable that is no module its name, which is
    all that is known.

    A module is told by what it prints and by its weights and buffers. Three kinds compute with more
    than these, and more of them counts:

    - TorchScript: all that its file would hold, such as the constants to which ``torch.jit.freeze``
      turns weights;
    - a graph of ``torch.export`` or ``torch.fx``: its code and its constants;
    - a module without parameters: its attributes, and the files that its classes are written in.
      A UserWarning names a class whose file cannot be read.

    Weights that are shared out over processes count as the whole ones; each of these processes must
    call it.
    """
    if not isinstance(model, nn.Module):
        return str(getattr(model, "__qualname__", type(model).__qualname__))
    give_back_gathered(model)
    digest = hashlib.sha256(ADDRESS.sub("", printed_without_fsdp(model)).encode())
    for name, value in model.state_dict().items():
        is_packed = isinstance(value, tuple)  # the weight and the bias of a quantised layer
        for tensor in value if is_packed else (value,):
            if isinstance(tensor, Tensor):
                digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(_bytes(tensor))

    classes: dict[type, None] = {}
    has_parameters = next(model.parameters(), None) is not None
    for module in _without_inside_of_script(model):
        if isinstance(module, torch.jit.ScriptModule):
            parts = _script_parts(module)
        elif isinstance(module, fx.GraphModule):
            parts = itertools.chain([module.code.encode()], _attribute_parts(module))
        elif not has_parameters:
            classes[type(module)] = None
            parts = _attribute_parts(module)
        else:
            continue
        for part in parts:
            digest.update(part)
    for text in dict.fromkeys(map(_source, classes)):
        digest.update(text.encode())
    return digest.hexdigest()


def unsaved_digest(model: nn.Module) -> str | None:
    """SHA-256 of the tensors that a module has beside its ``state_dict``; None if there are none.
    ``model_digest`` leaves them out of a module with parameters, so that older results stay."""
    parts = [
        part
        for module in _without_inside_of_script(model)
        if not isinstance(module, torch.jit.ScriptModule)
        for part in _unsaved_tensors(module)
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest() if parts else None


def _bytes(tensor: Tensor) -> bytes:
    """The values of a tensor of any dtype; of one that is shared out over processes, all."""
    plain = whole_tensor(tensor).cpu()
    plain = plain.dequantize() if plain.is_quantized else plain
    plain = plain if plain.layout == torch.strided else plain.to_dense()
    return plain.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _without_inside_of_script(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all below it; TorchScript is one piece."""
    yield module
    if not isinstance(module, torch.jit.ScriptModule):
        for child in module.children():
            yield from _without_inside_of_script(child)


def _script_parts(module: torch.jit.ScriptModule) -> Iterator[bytes]:
    """What the file of a TorchScript module holds, without what differs from one file to the next:
    its random number, source lines, the device, and the numbers in names of classes."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            torch.jit.save(module, file)
        except RuntimeError:  # it calls Python, which no file can hold
            return

    parts = []
    with zipfile.ZipFile(file) as archive:
        for path in archive.namelist():
            _, _, name = path.partition("/")
            content = archive.read(path)
            if name.endswith(".py"):
                content = _plain(content.decode()).encode()
            elif name.endswith(".pkl"):
                steps = [_plain(f"{step.name} {argument}") for step, argument, _ in genops(content)]
                content = "\n".join(steps).encode()
            elif not name.startswith(("data/", "constants/")):
                continue
            parts.append((_plain(name).encode(), content))
    for name_and_content in sorted(parts):
        yield from name_and_content


def _plain(text: str) -> str:
    return NOT_ITS_OWN.sub("", text)


def _attribute_parts(module: nn.Module) -> Iterator[bytes]:
    """Tensors, numbers and texts of a module that its ``state_dict`` lacks."""
    yield from _unsaved_tensors(module)
    for name, value in sorted(vars(module).items()):
        if name != "training" and not name.startswith("_") and _is_simple(value):
            yield f"{name}{value!r}".encode()


def _unsaved_tensors(module: nn.Module) -> Iterator[bytes]:
    """Attributes that are tensors or lists of them, and buffers that are not persistent."""
    unsaved = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
    for name, value in sorted((vars(module) | unsaved).items()):
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, Tensor):
                yield f"{name}{each.dtype}{tuple(each.shape)}".encode()
                yield _bytes(each)


def _is_simple(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_simple, value))
    return value is None or isinstance(value, bool | int | float | str)


def _source(kind: type) -> str:
    """The file that a class is written in, as text; nothing for torch and this library, which do
    not change between two runs."""
    if kind.__module__.partition(".")[0] in ("torch", "ironmoe"):
        return ""
    for what in (sys.modules.get(kind.__module__), kind):
        with suppress(OSError, TypeError):
            return inspect.getsource(what)  # type: ignore[arg-type]
    warn_user(
        f"{kind.__qualname__} has no parameters, and its source cannot be read: two models of this "
        "class are taken for the same one where results are kept",
    )
    return ""
