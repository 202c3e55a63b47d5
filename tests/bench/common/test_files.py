"""Files that several commands write, and the radii they are about."""

import json
import math
import os
import socket
import subprocess
import sys

import pytest

from ironmoe.bench.common.files import finite, open_atomically, slug, write_json
from ironmoe.bench.common.radii import all_from_255, ascending_radii, exact, from_255, to_255
from ironmoe.bench.common.user_error import UserError


@pytest.mark.parametrize(
    ("name", "separator", "expected"),
    [
        ("V-MoE seed 0", "-", "v-moe-seed-0"),
        ("robust V-MoE", "-", "robust-v-moe"),
        ("V-MoE", "_", "v_moe"),
        ("NVIDIA H100 80GB HBM3", "-", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_names_become_parts_of_file_names(name, separator, expected):
    assert slug(name, separator) == expected


def test_json_has_none_for_what_is_not_finite(tmp_path):
    content = {"a": [1.0, math.nan, (math.inf, "x")], "b": {"c": -math.inf}}
    assert finite(content) == {"a": [1.0, None, [None, "x"]], "b": {"c": None}}
    write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == finite(content)
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    left = tmp_path / f"x.json.{here}.{ended.pid}.partial"
    others = [
        tmp_path / f"x.json.{here}.{os.getppid()}.partial",  # its process runs
        tmp_path / f"x.json.other-{here}.{ended.pid}.partial",  # of another machine
        tmp_path / f"y.json.{here}.{ended.pid}.partial",
        tmp_path / f"x.json.{here}.notes.partial",
    ]
    for file in (left, *others):
        file.write_text('{"a": ')
    write_json(tmp_path / "x.json", {"a": 1})
    assert not left.exists() and all(file.exists() for file in others)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_an_error_while_a_file_is_written_leaves_the_old_one_alone(tmp_path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ZeroDivisionError), open_atomically(tmp_path / "x.json") as file:
        file.write(b"2")
        raise ZeroDivisionError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.json", "1")]


def test_radii_go_to_the_pixel_range_and_back():
    assert all_from_255(ascending_radii("8,2,8", "Linf")) == [2 / 255, 8 / 255]
    assert to_255(from_255(51)) == pytest.approx(51) and exact(0.1) == "0.1"
    with pytest.raises(UserError, match="--eps must be numbers separated by commas"):
        ascending_radii("8;2", "Linf")
