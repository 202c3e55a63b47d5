"""Checkpoints of models in one process and in several."""

import json
import os
import pickle
import re
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from ironmoe.moe import CheckpointError, MoE

pytest.importorskip("safetensors")
from ironmoe.moe.distributed import (
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)


def made(experts=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), MoE(6, 5, experts)).eval()


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **options)


def step(model, optimizer):
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    return model


def assert_same(model, other):
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert one.equal(two), name


def test_what_one_world_saves_another_loads(tmp_path):
    """All cases in one program, because imports take most of the time."""
    pytest.importorskip("msgpack")
    from worlds import run_program

    run_program("checkpoints_on_ranks", tmp_path)


# save_checkpoint and load_checkpoint in one process, without torch.distributed


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_training_goes_on_as_if_it_had_not_been_saved(tmp_path, lr):
    model = made()
    optimizer = adamw(model, lr=lr, betas=(0.5, 0.75))
    step(model, optimizer)
    save_checkpoint(tmp_path / "run", model, optimizer, numbers={"epoch": 3, "best": [0.5, "x"]})
    step(model, optimizer)

    other = changed(made())
    fresh = adamw(other, lr=lr * 2)
    loaded = load_checkpoint(tmp_path / "run", other, fresh)
    assert loaded.numbers == {"epoch": 3, "best": [0.5, "x"]}
    assert (loaded.world_size, loaded.meshes, loaded.resharded) == (1, (), False)
    assert loaded.torch == torch.__version__
    assert fresh.param_groups[0]["betas"] == (0.5, 0.75)
    assert isinstance(fresh.param_groups[0]["lr"], type(lr))
    step(other, fresh)
    assert_same(model, other)


def test_other_versions_are_named(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, made())
    assert load_checkpoint(tmp_path, made()).changes == ()
    former = torch.__version__
    monkeypatch.setattr("ironmoe.moe.parallel.checkpoint._version", lambda: "0.0.1")
    monkeypatch.setattr(torch, "__version__", "99.0")
    loaded = load_checkpoint(tmp_path, made())
    assert loaded.changes == (
        f"ironmoe: {loaded.ironmoe} there, 0.0.1 now",
        f"torch: {former} there, 99.0 now",
    )
    assert not loaded.resharded


def test_a_parameter_without_a_state_has_none_after_loading(tmp_path):
    """torch's set_state_dict would make one, as if it had made a step."""
    model = made()
    model[1].router.weight.requires_grad_(False)
    optimizer = adamw(model)
    step(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer)
    other = made()
    fresh = adamw(other)
    load_checkpoint(tmp_path, other, fresh)
    assert other[1].router.weight not in fresh.state
    assert len(fresh.state) == len(list(other.parameters())) - 1


def test_wrappers_do_not_change_the_names(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = made()
    model[1] = checkpoint_wrapper(model[1])
    optimizer = adamw(model)
    step(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer)
    other = made()
    fresh = adamw(other)
    load_checkpoint(tmp_path, other, fresh)
    assert_same(other, model)
    assert other[1].fc1.weight in fresh.state


def optimizers():
    model = made()
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
    return {
        "SGD": (model, torch.optim.SGD(model.parameters(), lr=0.1), "betas.* are not options of"),
        "two groups": (
            model,
            torch.optim.AdamW(groups),
            "found 1 groups .*, expected 2",
        ),
        "a part": (model, adamw(model[0]), "found other parameters: ..1.fc1.bias"),
    }


@pytest.mark.parametrize("name", ["SGD", "two groups", "a part"])
def test_another_optimizer_is_named(tmp_path, name):
    model = made()
    save_checkpoint(tmp_path, model, adamw(model))
    other, optimizer, words = optimizers()[name]
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path, other, optimizer)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: made(3), r"1\.router\.weight: found .*4, 6.*, expected float32 of shape .3, 6."),
        (
            lambda: made().double(),
            r"0\.weight: found .*float32.*, expected float64 of shape .6, 6.",
        ),
        (
            lambda: made()[0],
            "missing: bias, weight; not in the model: 0.bias, 0.weight, .* and 2 more",
        ),
    ],
    ids=["shape", "dtype", "names"],
)
def test_another_model_is_named_and_left_as_it_is(tmp_path, model, words):
    save_checkpoint(tmp_path, made())
    other, same = changed(model()), changed(model())
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path, other)
    assert_same(other, same)


def test_a_checkpoint_without_an_optimizer_says_so(tmp_path):
    model = made()
    save_checkpoint(tmp_path, model)
    with pytest.raises(CheckpointError, match="found no optimizer, expected one"):
        load_checkpoint(tmp_path, model, adamw(model))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_a_damaged_file_is_named_and_the_model_left_as_it_is(tmp_path, name, damage):
    save_checkpoint(tmp_path, made())
    (file,) = tmp_path.glob(f"ironmoe-data-1/{name}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "bit" else content[:-9])
    other, same = changed(made()), changed(made())
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: found"):
        load_checkpoint(tmp_path, other)
    assert_same(other, same)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    """With right checksums, as whoever means harm would write them."""
    save_checkpoint(tmp_path, made())
    (file,) = tmp_path.glob("ironmoe-data-1/.metadata")
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    description = json.loads((tmp_path / "ironmoe.json").read_text())
    content = file.read_bytes()
    description["files"][".metadata"] = [len(content), zlib.crc32(content)]
    del description["checksum"]
    text = json.dumps(description, sort_keys=True).encode()
    (tmp_path / "ironmoe.json").write_text(json.dumps(description | {"checksum": zlib.crc32(text)}))
    with pytest.raises(CheckpointError, match="mkdir is no description of a tensor"):
        load_checkpoint(tmp_path, made())
    assert not (tmp_path / "bomb").exists()


def test_what_a_checkpoint_cannot_hold_is_refused_before_a_file_is_made(tmp_path):
    model = made()
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(tmp_path, model, numbers={"x": torch.ones(1)})
    with pytest.raises(ValueError, match="parameters of the model alone, got 2 others"):
        save_checkpoint(tmp_path, model[1], adamw(model))
    save_checkpoint(tmp_path / "run", model, adamw(model))
    with pytest.raises(ValueError, match="parameters of the model alone, got 2 others"):
        load_checkpoint(tmp_path / "run", model[1], adamw(model))
    with pytest.raises(ValueError, match=r"0\.weight on the meta device: call model\.to_empty"):
        save_checkpoint(tmp_path, made().to("meta"))
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


# save_weights and load_weights in one process


def mixed():
    """Tensors of many dtypes, without axes and without elements, too."""
    model = made()
    model.wide = nn.Parameter(torch.randn(3, 5).bfloat16())
    model.register_buffer("mask", torch.tensor([True, False, True]))
    model.register_buffer("count", torch.tensor(7))
    model.register_buffer("none", torch.zeros(0, 4, dtype=torch.float16))
    return model


@pytest.mark.parametrize("max_file_bytes", [1, 300, 10**9])
def test_whole_tensors_are_what_others_read_and_are_read_again(tmp_path, max_file_bytes):
    from safetensors.torch import load_file

    model = mixed()
    save_weights(tmp_path / "m.safetensors", model, max_file_bytes=max_file_bytes)
    files = [file for file in tmp_path.iterdir() if file.suffix == ".safetensors"]
    assert (len(files) == 1) == (max_file_bytes > 1000)
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert read[name].dtype == tensor.dtype, name
        assert read[name].equal(tensor), name

    other = changed(mixed())
    other.count += 1
    load_weights(tmp_path / "m.safetensors", other)
    for name, tensor in model.state_dict().items():
        assert other.state_dict()[name].equal(tensor), name


def test_files_of_others_are_read_in_the_dtype_of_the_model(tmp_path):
    from safetensors.torch import save_file

    model = made()
    save_file({n: t.double() for n, t in model.state_dict().items()}, tmp_path / "m.safetensors")
    other = changed(made())
    load_weights(tmp_path / "m.safetensors", other)
    assert_same(model, other)


@pytest.mark.parametrize("former", [100, 10**9])
@pytest.mark.parametrize("new", [100, 200, 10**9])
@pytest.mark.parametrize("failing", range(1, 14))
def test_interrupted_weights_are_the_older_ones_none_or_the_new_ones(
    tmp_path, monkeypatch, former, new, failing
):
    file, older, newer = tmp_path / "m.safetensors", made(2), changed(made(2))
    save_weights(file, older, max_file_bytes=former)
    calls = []

    def failing_call(real):
        def call(*arguments, **options):
            calls.append(real)
            if len(calls) == failing:
                raise OSError("interrupted")
            return real(*arguments, **options)

        return call

    for place, name in ((os, "fsync"), (Path, "replace")):
        monkeypatch.setattr(place, name, failing_call(getattr(place, name)))
    try:
        save_weights(file, newer, max_file_bytes=new)
    except CheckpointError as error:
        assert "interrupted" in str(error)
    monkeypatch.undo()

    found = made(2)
    try:
        load_weights(file, found)
    except CheckpointError as error:
        assert "found no such file" in str(error)
    else:
        expected = older if found[0].weight.equal(older[0].weight) else newer
        assert_same(found, expected)
    save_weights(file, newer, max_file_bytes=new)
    names = {path.name for path in tmp_path.iterdir()}
    assert not any(name.startswith(".tmp") for name in names)
    assert ("m.safetensors" in names) != ("m.safetensors.index.json" in names)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (made()[0], "missing: 0.bias, .* and 2 more; not in the model: bias, weight"),
        (made(3), r"1\.\S+: found shape .3.*, expected .4"),
    ],
    ids=["names", "shapes"],
)
def test_weights_of_another_model_are_named_and_the_model_left_as_it_is(tmp_path, other, words):
    save_weights(tmp_path / "m.safetensors", other)
    model, same = changed(made()), changed(made())
    with pytest.raises(CheckpointError, match=words):
        load_weights(tmp_path / "m.safetensors", model)
    assert_same(model, same)


def test_damaged_and_missing_files_of_weights_are_named(tmp_path):
    file = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"ends with \.safetensors, got .*m\.pt"):
        save_weights(tmp_path / "m.pt", made())
    with pytest.raises(CheckpointError, match="found no such file, expected it, or m"):
        load_weights(file, made())
    save_weights(file, made())
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"m\.safetensors: found SafetensorError"):
        load_weights(file, made())
    save_weights(file, made(), max_file_bytes=100)
    (part, *_) = tmp_path.glob("m-00002-of-*")
    part.unlink()
    with pytest.raises(CheckpointError, match=f"{part.name}: found no such file"):
        load_weights(file, made())
