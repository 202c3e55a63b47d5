"""Checkpoints in a folder of the test's own. They need msgpack, which may be missing; the tests
say so first."""

import shutil

import pytest

from ironmoe.moe.checkpoints.write import write_vmoe_checkpoint


@pytest.fixture
def golden(tmp_path):
    from checkpoint_files import DATA, GOLDEN_FILES

    for name in GOLDEN_FILES:
        shutil.copy(DATA / name, tmp_path)
    return tmp_path / "vmoe_tiny"


@pytest.fixture
def small(tmp_path):
    from checkpoint_files import SMALL

    write_vmoe_checkpoint(tmp_path / "small", SMALL, shards=2, chunk_bytes=16)
    return tmp_path / "small"
