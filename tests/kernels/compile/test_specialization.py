"""What the compile report tells the compiler of a launch is what Triton's JIT would tell it, and
how many programs an SM holds.
"""

from importlib.util import find_spec

import pytest

from ironmoe.kernels.compile.occupancy import PROCESSORS, programs_an_sm
from ironmoe.kernels.tuning import CHIPS

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
THROUGH_JIT = """
import json, sys
import triton
from triton.runtime.driver import driver
from ironmoe.kernels.compile.specialization import specialize, target_of
from ironmoe.kernels.tuning import CHIPS
from ironmoe.kernels.compile.width_launches import every_launch

class Stub:
    def get_current_target(self):
        return target_of(chip)

    def get_current_device(self):
        return chip.name

    def get_current_stream(self, device):
        return 0


asked = []


def hook(*, compile, **_):
    asked.append(compile)
    return True  # compile nothing


driver.set_active(Stub())
triton.knobs.runtime.jit_cache_hook = hook
answers = {}
for name in json.loads(sys.argv[1]):
    chip, differ = CHIPS[name], []
    asked.clear()
    recorded = every_launch(chip)
    for named in recorded:
        launch = named.launch
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **options)
        found = specialize(launch, chip)
        jit = asked[-1]
        same = (jit["signature"], jit["constants"], jit["configs"][0]) == tuple(found)
        if not same or (jit["num_warps"], jit["num_stages"]) != tuple(options.values()):
            differ.append(named.name)
    integers = {s.launch.arguments["experts"].dtype for s in recorded if s.name == "place"}
    answers[name] = {"launches": len(recorded), "compilations": len(asked), "differ": differ,
                     "integers": len(integers)}
print(json.dumps(answers))
"""
KNOWN = """
import json, sys
import torch
from ironmoe.kernels.gpu import combine
from ironmoe.kernels.gpu.launch import observe
from ironmoe.kernels.compile.specialization import specialize
from ironmoe.kernels.tuning import CHIPS

answers = []
for name, rows, width in json.loads(sys.argv[1]):
    with observe() as launches:
        values = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
        combine.combine(values, None, torch.empty(3, 2, device="meta"))
    found = specialize(launches[0], CHIPS[name])
    names = list(found.signature)
    told = {names[path[0]]: [name for name, _ in known]
            for path, known in found.attributes.items() if known}
    constants = [names[path[0]] for path in found.constants]
    answers.append({"signature": found.signature, "told": told, "constants": constants})
print(json.dumps(answers))
"""


@needs_triton
def test_every_launch_is_what_the_jit_would_compile(run_compiled):
    """Among them choices of every integer type that dispatch takes."""
    for chip, found in run_compiled(THROUGH_JIT, ["sm_80", "sm_90", "sm_100", "gfx942"]).items():
        assert found["differ"] == [], chip
        assert found["compilations"] == found["launches"] > 300, "the JIT takes no two for the same"
        assert found["integers"] == 4


@needs_triton
def test_what_the_compiler_knows(run_compiled):
    """Aligned addresses and multiples of 16 on every chip; on AMD also which tensors lie within 2
    GB.
    """
    aligned, near = "tt.divisibility", "tt.pointer_range"
    cases = [
        ("sm_90", 6, 32),
        ("sm_90", 6, 31),
        ("sm_90", 6, 1),
        ("gfx942", 6, 32),
        ("gfx942", 524_288, 2048),
    ]  # the last has 2 GB
    found, odd, single, small, large = run_compiled(KNOWN, cases)
    assert (
        found["signature"] | {"rows": "*bf16", "num_tokens": "i32", "D": "i32"}
        == found["signature"]
    )
    assert found["told"] == {
        name: [aligned] for name in ("rows", "slot_row", "out", "D", "row_stride")
    }
    assert set(found["constants"]) == {"gates", "TOP_K", "BLOCK_T", "BLOCK_D"}
    assert "D" not in odd["told"] and {"D", "row_stride"} <= set(single["constants"]), (
        "a size of 1 is a constant"
    )
    assert small["told"]["rows"] == [aligned, near] and large["told"]["rows"] == [aligned]
    assert large["told"]["slot_row"] == [aligned, near]


@pytest.mark.parametrize(
    ("chip", "registers", "warps", "shared", "programs"),
    [
        ("sm_90", 128, 8, 107 * 1024, 2),  # registers: 4096 a warp, 16 warps
        # 136 registers are given out: three warps a partition are no two programs of eight
        ("sm_90", 129, 8, 0, 1),
        ("sm_90", 168, 4, 0, 3),  # 5376 a warp: 3 in each of 4 partitions
        ("sm_90", 128, 8, 139 * 1024, 1),  # shared memory: 228 KB, 1 KB more a program
        ("sm_90", 32, 4, 0, 16),  # warps: 64
        ("sm_90", 16, 1, 0, 32),  # programs: 32
        ("sm_90", 32, 1, 232_448, 1),  # the largest there can be
        ("sm_90", 32, 1, 232_449, 0),
        # shared memory: a quarter of 164 KB with the 1 KB that is reserved
        ("sm_80", 64, 8, 40_960, 4),
        ("sm_80", 64, 8, 40_961, 3),
        ("sm_86", 64, 8, 0, 4),
        ("sm_89", 32, 4, 0, 12),  # 48 warps
        ("gfx942", 120, 8, 8192, 2),  # four waves a SIMD of 512 registers
        ("gfx942", 256, 8, 8192, 1),
        ("gfx942", 64, 4, 16_384, 4),  # 64 KB of LDS
    ],
)
def test_programs_an_sm_by_hand(chip, registers, warps, shared, programs):
    assert programs_an_sm(CHIPS[chip], registers, warps, shared) == programs


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_more_of_anything_never_makes_more_programs(chip):
    assert CHIPS.keys() == PROCESSORS.keys()
    for warps in (1, 4, 8):
        for registers in range(8, 249, 8):
            for shared in range(0, chip.shared_memory, 8192):
                here = programs_an_sm(chip, registers, warps, shared)
                assert here >= programs_an_sm(chip, registers + 8, warps, shared)
                assert here >= programs_an_sm(chip, registers, warps, shared + 8192)
                assert here >= programs_an_sm(chip, registers, warps * 2, shared)
                assert here * warps <= PROCESSORS[chip.name].warps
