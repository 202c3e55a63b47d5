"""The folder of a checkpoint is whole, or as it was before, whatever interrupts a save."""

import itertools
import json
import os
from pathlib import Path

import pytest

from ironmoe.moe.checkpoints.errors import CheckpointError
from ironmoe.moe.checkpoints.folder import (
    begin,
    checksum_of_file,
    describe,
    finish,
    require_whole,
)


def save(folder, text):
    data = begin(folder)
    (data / "part").write_text(text)
    finish(data, {"part": checksum_of_file(data / "part")}, {"said": text})


def saved_in(folder):
    """What was saved, when the description and the data agree."""
    description = describe(folder)
    data = folder / description["data"]
    for name, checksum in description["files"].items():
        require_whole(data, name, checksum)
    assert (data / "part").read_text() == description["said"]
    return description["said"]


def test_a_new_checkpoint_takes_the_place_of_the_former_and_files_of_others_stay(tmp_path):
    folder = tmp_path / "new" / "run"
    for text in ("one", "two", "three"):
        save(folder, text)
        assert saved_in(folder) == text
        (folder / "notes").write_text("mine")
        (folder / "ironmoe-data-mine").mkdir(exist_ok=True)
    names = {file.name for file in folder.iterdir()}
    assert names == {"ironmoe.json", "ironmoe-data-3", "notes", "ironmoe-data-mine"}


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_an_interrupted_save_leaves_a_whole_checkpoint_and_the_next_one_cleans_up(
    tmp_path, monkeypatch, call
):
    """At each call that changes the folder."""
    save(tmp_path, "former")
    place = os if call == "fsync" else Path
    real = getattr(place, call)
    for failing in itertools.count(1):
        calls = itertools.count(1)

        def fail(*arguments, failing=failing, calls=calls, **options):
            if next(calls) == failing:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        monkeypatch.setattr(place, call, fail)
        try:
            save(tmp_path, f"new {failing}")
        except KeyboardInterrupt:
            assert saved_in(tmp_path) in ("former", f"new {failing}")
            monkeypatch.setattr(place, call, real)
            save(tmp_path, "former")
            assert len(list(tmp_path.glob("ironmoe-data-*"))) == 1
        else:
            break
    assert failing > 1
    assert saved_in(tmp_path) == f"new {failing}"


def test_a_first_save_that_did_not_finish_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"ironmoe\.json: found no such file, expected a"):
        describe(tmp_path)
    begin(tmp_path)
    with pytest.raises(CheckpointError, match="ironmoe-data-1 of a save that did not finish"):
        describe(tmp_path)
    save(tmp_path, "whole")
    assert saved_in(tmp_path) == "whole"


def test_a_changed_bit_anywhere_is_refused(tmp_path):
    save(tmp_path, "text")
    for file in (tmp_path / "ironmoe.json", tmp_path / "ironmoe-data-1" / "part"):
        whole = file.read_bytes()
        for i, byte in enumerate(whole):
            file.write_bytes(whole[:i] + bytes([byte ^ 1]) + whole[i + 1 :])
            if byte in b" \n" and file.suffix == ".json":
                continue  # between the words of JSON a tab may stand for a space
            with pytest.raises(CheckpointError) as error:
                saved_in(tmp_path)
            assert str(error.value).startswith(str(file))
        file.write_bytes(whole)
    assert saved_in(tmp_path) == "text"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": "ironmoe.checkpoint/2"}'])
def test_another_format_is_named_and_its_data_stay_until_a_new_checkpoint_is_whole(
    tmp_path, content
):
    save(tmp_path, "text")
    (tmp_path / "ironmoe.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ironmoe\.json: found .*, expected"):
        describe(tmp_path)
    data = begin(tmp_path)
    assert (tmp_path / "ironmoe-data-1" / "part").exists()
    finish(data, {}, {})
    assert [file.name for file in tmp_path.glob("ironmoe-data-*")] == [data.name]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.unlink(), "found no such file, expected a file of 4 bytes"),
        (lambda file: file.write_text("tex"), "found 3 bytes, expected 4"),
        (lambda file: file.write_text("test"), r"found checksum \d+, expected \d+"),
    ],
)
def test_a_damaged_file_of_data_is_named(tmp_path, damage, words):
    save(tmp_path, "text")
    damage(tmp_path / "ironmoe-data-1" / "part")
    with pytest.raises(CheckpointError, match=f"part: {words}"):
        saved_in(tmp_path)


def test_a_file_that_process_0_does_not_see_is_named(tmp_path):
    save(tmp_path, "former")
    data = begin(tmp_path)
    with pytest.raises(CheckpointError, match="other: found none or another file"):
        finish(data, {"other": (3, 0)}, {})
    assert saved_in(tmp_path) == "former"


def test_the_description_can_be_read_by_people(tmp_path):
    save(tmp_path, "text")
    lines = (tmp_path / "ironmoe.json").read_text()
    assert json.loads(lines)["format"] == "ironmoe.checkpoint/1"
    assert lines.count("\n") > 5
