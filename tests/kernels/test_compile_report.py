"""Kernels compiled for GPUs that are not here: a sample on every chip, narrow widths, and designs that must be found out."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from ironmoe.kernels.tuning import CHIPS, MATRIX

REPORTED = ("sm_80", "sm_90", "sm_100", "gfx942")
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
SAMPLE = """
import json, sys
import torch
from ironmoe.kernels import tuning
from ironmoe.kernels.compile_report import examine
from ironmoe.kernels.specimens import specimens

chip, *wanted = sys.argv[1:]
if len(wanted) == 1:  # a bad design: four warps cannot hold the accumulators of a 128 × 256 tile in registers
    tuning.WIDE["gated"] = tuning.Blocks(128, 256, 64, warps=4, stages=1)
found = {}
for specimen in specimens(tuning.CHIPS[chip]):
    rows = specimen.launch.arguments.get("BLOCK_M", 128)
    if specimen.name in wanted and rows == 128 and specimen.dtype != torch.float32:
        found[specimen.name] = specimen
findings = [examine(specimen, tuning.CHIPS[chip]) for specimen in found.values()]
print(json.dumps([finding._asdict() | {"faults": finding.faults()} for finding in findings]))
"""
COVERAGE = """
import json, sys
import torch
from ironmoe.kernels.specimens import specimens
from ironmoe.kernels.tuning import CHIPS, PRODUCTS, blocks_for

chip = CHIPS[sys.argv[1]]
compiled, table = set(), set()
for specimen in specimens(chip):
    a = specimen.launch.arguments
    if "BLOCK_K" in a and "BLOCK_N" in a:
        blocks = a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"], specimen.launch.num_warps, specimen.launch.num_stages
        compiled.add((str(specimen.dtype), *blocks))
for dtype, rows in ((torch.bfloat16, (16, 32, 64, 128)), (torch.float32, (16, 32))):
    for product in PRODUCTS:
        chosen = [blocks_for(product, dtype, row, chip) for row in rows]
        if dtype == torch.bfloat16:
            chosen.append(blocks_for(product, dtype, rows[-1], chip, aligned=False))
        table |= {(str(dtype), b.m, b.n, b.k, b.warps, b.stages) for b in chosen}
print(json.dumps({"missing": sorted(table - compiled), "table": len(table)}))
"""

NARROW = """
import json, sys
import torch
from ironmoe.kernels.compile_report import lower
from ironmoe.kernels.tuning import CHIPS
from ironmoe.kernels.width_specimens import collect, experts, rows

chip = CHIPS[sys.argv[1]]
found = collect(chip, rows((16, 32, 64)), experts((31,)))
found = [s for s in found if s.dtype == torch.bfloat16 or "scatter" in s.name]
found = [s for s in found if s.launch.arguments.get("BLOCK_M") != 128]
for specimen in found:
    lower(specimen, chip)
print(json.dumps([specimen.name for specimen in found]))
"""


def run(script, *arguments):
    """In a process of its own: in this one the kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("chip", REPORTED)
def test_a_sample_compiles_without_faults(chip):
    gated, plain = "grouped_matmul: up, swiglu, H kept", "hidden_gradient: gelu, units for dW₂"
    up, through = "grouped_matmul: up, clamped_swiglu_interleaved, H kept", "hidden_gradient: clamped_swiglu_interleaved"
    findings = run(SAMPLE, chip, gated, plain, up, f"{through}, units for dW₂", "weight_gradient: dW₁", "place", "l2_step")
    assert len(findings) == 7
    for finding in findings:
        assert finding["faults"] == []
        assert finding["registers"] > 0
        assert (finding["matrix"] > 0) == (finding["tile"] != ""), "matrix instructions, and only in products"
        assert 0 <= finding["shared"] <= CHIPS[chip].shared_memory


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx942"])
def test_narrow_rows_pass_the_compiler(chip):
    """Widths and strides at which a pass of Triton 3.6 once failed; all of them are in ``ironmoe doctor --compile``."""
    found = run(NARROW, chip)
    assert {name.split(":")[0] for name in found} >= {"scatter_rows", "gather_sum", "grouped_matmul", "hidden_gradient"}
    assert "scatter_rows: width 32" in found and len(found) > 20


def test_a_spill_is_found():
    (finding,) = run(SAMPLE, "sm_90", "grouped_matmul: up, swiglu, H kept")
    assert finding["spills"] > 100 and "spilling instructions" in finding["faults"][0]


@pytest.mark.parametrize("chip", REPORTED)
def test_every_configuration_of_the_table_is_compiled(chip):
    covered = run(COVERAGE, chip)
    assert covered["missing"] == [] and covered["table"] > 10


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, 0),
        ({"stack": 8}, 1),
        ({"error": "RuntimeError: a pass failed", "spills": 2}, 1),
        ({"spills": 2}, 1),
        ({"shared": 300_000}, 1),
        ({"matrix": 0}, 1),
        ({"matrix": 0, "dtype": "fp32"}, 0),
        ({"matrix": 0, "tile": "32×128×64"}, 0),
        ({"matrix": 0, "tile": ""}, 0),
    ],
)
def test_what_counts_as_a_fault(change, faults):
    from ironmoe.kernels.compile_report import Finding

    good = Finding("sm_90", "grouped_matmul", "bf16", "128×128×64", 8, 3, 180, 0, 0, 100_000, 4, {})
    assert len(good._replace(**change).faults()) == faults


def test_what_passes_through_shared_memory_is_counted():
    from ironmoe.kernels.compile_report import Finding

    code = {"BAR": 3, "STS": 2, "STSM": 1, "LDS": 4, "LDSM": 5, "LDGSTS": 7, "BSYNC": 1, "HGMMA": 8}
    finding = Finding("sm_90", "grouped_matmul", "bf16", "128×128×64", 8, 3, 128, 0, 0, 100_000, 8, code)
    assert finding.shared_traffic == (3, 3, 9) and finding.programs == 2
    amd = {"s_barrier": 2, "ds_write_b32": 1, "ds_write2st64_b32": 1, "ds_read_b128": 6, "buffer_load_dword": 9}
    assert finding._replace(chip="gfx942", instructions=amd).shared_traffic == (2, 2, 6)


def test_every_chip_has_a_matrix_instruction():
    assert MATRIX.keys() == CHIPS.keys()
