"""The report of a run on a GPU: every section, from results as a GPU would give them."""

import pytest

from ironmoe.bench.benchmarks.gpu.markdown import markdown
from ironmoe.bench.benchmarks.gpu.report import goals, news, wrong
from ironmoe.bench.benchmarks.passes import DX, FORWARD
from ironmoe.bench.benchmarks.peers import OURS
from ironmoe.bench.benchmarks.shapes import MAIN

PLACE = {"shape": MAIN.name, "routing": "uniform", "dtype": "bfloat16"}
TIMING = {"ms": 4.2, "p20": 4.1, "p80": 4.3, "runs": 20, "host_ms": 0.4}
FIGURES = {
    "tflops": 577.0, "share_of_product": 0.73, "product_tflops": 790.0, "limit_ms": 3.5,
    "peak_bytes": 2_000_000_000,
    "saved_bytes": None, "error": 0.012, "allowed": 0.05, "agrees": True, "sm_mhz": 1755.0,
    "watts": 612.0, "celsius": 63.0,
}  # fmt: skip


def row(name, pass_name, **figures):
    layer = {"sizes": MAIN.sizes, "activation": MAIN.activation, "bias": MAIN.bias}
    return {
        "implementation": name,
        "pass": pass_name,
        **layer,
        **PLACE,
        **TIMING,
        **FIGURES,
        **figures,
    }


@pytest.fixture
def content():
    rows = [
        row(OURS, FORWARD),
        row("liger-kernel", FORWARD, ms=9.0, error=0.3, agrees=False),
        row(OURS, DX),
        row("moe-ops", DX, error=None, agrees=False),
    ]
    return {
        "date": "2026-01-02 03:04",
        "device": {"name": "NVIDIA H200"},
        "versions": {"torch": "2.11.0"},
        "dtype": "bfloat16",
        "minutes": 9.0,
        "finished": False,
        "why_not_finished": "no time for all of tune",
        "jobs": [
            {"job": "case qwen3-30b uniform", "outcome": "done", "why": "", "seconds": 44.0},
            {"job": "attack", "outcome": "hung", "why": "ended after 120 s", "seconds": 120.0},
        ],
        "tests": {
            "outcome": "failed",
            "why": "",
            "counts": {"passed": 900, "failed": 1},
            "of": 910,
            "longest": [],
            "failures": [{"test": "tests/a.py::test_b[x|y]", "why": "assert 1 == 2\nmore"}],
            "not_run": [{"file": "tests/a.py", "why": "needs hypothesis", "tests": 9}],
        },
        "goals": [goal._asdict() for goal in goals(rows)],
        "rows": rows,
        "kernels": [
            {
                **PLACE,
                "pass": FORWARD,
                "kernel": "gather_sum_kernel",
                "number": 0,
                "us": 410.0,
                "share": 0.1,
            }
        ],
        "compiled": [
            {
                "job": "case",
                "kernels": 14,
                "seconds": 31.0,
                "from_cache": 2,
                "longest": "grouped_matmul_kernel, 4.1 s",
            }
        ],
        "blocks": [
            {
                "product": "activated",
                "shape": "vmoe",
                "pass": "by itself",
                "ms": 1.0,
                "former_ms": 1.5,
                "present": "stages 3",
                "former": "stages 4",
            },
            {"product": "gated", "shape": "vmoe", "why": "the former blocks: out of resources"},
        ],
        "attack": [
            {
                "model": "V-MoE-B/16",
                "way": "steps, eager",
                "images": 128,
                "steps": 10,
                "ms": 500.0,
                "images_per_s": 256.0,
                "first_call_s": 3.0,
            },
            {
                "model": "V-MoE-B/16",
                "way": "steps, CUDA graph",
                "images": 128,
                "steps": 10,
                "why": "RuntimeError: capture",
            },
        ],
        "checks": [
            {
                "check": "same bits in 5 runs",
                "shape": MAIN.name,
                "dtype": "bfloat16",
                "passed": False,
                "why": "differing: w_in",
            }
        ],
        "tuning": [{"text": '"plain": Blocks(…)'}],
        "notes": [
            {
                **PLACE,
                "implementation": "liger-kernel",
                "kind": "disagrees",
                "why": "disagrees | in y",
            }
        ],
    }


def test_every_section_is_there_and_every_table_is_one(content):
    text = markdown(content)
    titles = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "Wrong", "Goals", "Tests on this device", "Checks", "Block sizes now and before",
        "PGD on a whole model", "Layers",
        "Kernels by themselves", "Compiling", "Tuning", "Jobs", "Notes",
    ]  # fmt: skip
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 10 and all(
        len({line.count("|") for line in table}) == 1 for table in tables
    )
    for words in (
        "Not finished: no time for all of tune", "**3.0e-01** (allowed 0.05)",
        "**not finite** (allowed 0.05)", "1755, 612, 63",
        "900 passed, 1 failed of 910", "needs hypothesis | 9 | tests/a.py",
        "gather_sum_kernel | all | 410.0", "disagrees / in y",
    ):  # fmt: skip
        assert words in text


def test_what_is_wrong_comes_first_and_only_if_it_is_ours(content):
    faults = wrong(content, asked_for_tests=True)
    assert faults == [
        "tests: failed",
        f"same bits in 5 runs at {MAIN.name}: differing: w_in",
        "steps, CUDA graph on V-MoE-B/16: RuntimeError: capture",
        "attack: hung: ended after 120 s",
    ]
    assert "tests" not in "".join(wrong(content, asked_for_tests=False))


def test_what_is_said_when_a_pass_is_finished(content):
    (line,) = news({"kind": "part", "job": "case", "part": FORWARD, "rows": content["rows"][:2]})
    assert line == f"{FORWARD}: ironmoe 4.200 ms (577 TFLOP/s), liger-kernel 9.000 ms WRONG"
    said = news(
        {
            "kind": "part",
            "part": "",
            **{
                name: content[name]
                for name in ("notes", "compiled", "blocks", "attack", "checks", "tuning")
            },
        }
    )
    for words in (
        "14 kernels compiled in 31.0 s",
        "by itself: 1.000 ms, before 1.500",
        "256 images/s",
        "FAILED: differing",
        "liger-kernel disagrees",
    ):
        assert any(words in line for line in said), words
    assert news({"kind": "test", "test": "t", "outcome": "failed", "why": "a\nb"}) == [
        "FAILED t: a"
    ]
    assert (
        news({"kind": "test", "test": "t", "outcome": "passed", "why": ""})
        == news({"kind": "start"})
        == []
    )
