"""What reports and bench files say of the machine, the version and the command."""

import shlex
import subprocess
import sys

import pytest
import torch

from ironmoe.bench.common.machine import hardware, provenance


def test_the_machine_is_described_as_torch_and_the_system_see_it():
    found = hardware.hardware()
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] == hardware.cores() >= 1
    assert found["processor"] not in ("", "x86_64", "unknown")
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_the_device_in_words_has_the_name_of_the_processor():
    words = hardware.describe_device(torch.device("cpu"))
    assert hardware.processor() in words and "thread" in words


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2", False), ("avx512_bf16 amx", True), ("amx_bf16", True), ("asimd bf16", True)],
)
def test_products_of_bfloat16_are_read_from_the_flags_of_the_processor(
    monkeypatch, flags, expected
):
    monkeypatch.setattr(hardware, "_cpuinfo", lambda key: [flags] if key == "flags" else [])
    assert hardware.multiplies_bfloat16() is expected


def test_a_processor_that_says_nothing_is_neither_fast_nor_slow_in_bfloat16(monkeypatch):
    monkeypatch.setattr(hardware, "_cpuinfo", lambda key: [])
    assert hardware.multiplies_bfloat16() is None


def test_the_command_line_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ironmoe", "attack", "--data", "my photos"])
    assert provenance.command_line() == "ironmoe attack --data 'my photos'"
    assert shlex.split(provenance.command_line())[-1] == "my photos"


def test_a_checkout_gives_its_commit_and_a_package_none(monkeypatch, tmp_path):
    provenance.commit.cache_clear()
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert provenance.commit() is None

    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    provenance.commit.cache_clear()
    first = provenance.commit()
    assert len(first) == 40

    (tmp_path / "file").write_text("two")
    provenance.commit.cache_clear()
    assert provenance.commit() == f"{first}-changed"
    provenance.commit.cache_clear()


def written(folder, files):
    """The digest of a package of these files."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(provenance, "CHECKOUT", folder)
        return provenance.code_digest.__wrapped__()


def test_code_is_known_by_its_files_wherever_they_lie(tmp_path):
    files = {"kernels/a.py": "a = 1\n", "bench/page.html.jinja": "<p>", "moe/sub/b.py": ""}
    first = written(tmp_path / "one", files)
    beside = {
        "bench/results/rows.json": "{}",
        "kernels/__pycache__/a.pyc": "x",
        "tests/test_a.py": "",
    }
    assert written(tmp_path / "two", files | beside) == first

    others = [
        files | {"kernels/a.py": "a = 2\n"},
        files | {"moe/sub/new.py": ""},
        files | {"bench/page.html.jinja": "<b>"},
        {"kernels/a.py": "a = 1\n"},
        {"kernels/other.py": "a = 1\n", "bench/page.html.jinja": "<p>", "moe/sub/b.py": ""},
    ]
    digests = {written(tmp_path / str(number), other) for number, other in enumerate(others)}
    assert len(digests | {first}) == 6


def test_the_code_that_runs_here_has_a_digest_of_all_four_packages():
    found = {name: list((provenance.CHECKOUT / name).rglob("*.py")) for name in provenance.PACKAGES}
    assert all(found.values()) and len(provenance.code_digest()) == 12
