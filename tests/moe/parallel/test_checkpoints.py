"""Checkpoints of models in one process and in several."""

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("msgpack")
from worlds import run_program


def test_what_one_world_saves_another_loads(tmp_path):
    """All cases in one program, because imports take most of the time."""
    run_program("checkpoints_on_ranks", tmp_path)
