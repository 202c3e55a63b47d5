"""Limits of other GPUs: from the numbers of their data sheets, by hand."""

from pathlib import Path

import pytest

from ironmoe.bench.benchmarks.estimates.static_model import MACHINES
from ironmoe.bench.benchmarks.gpus import GPUS, GpuError, rates_compared, select_gpus
from ironmoe.bench.benchmarks.passes import DX, INFERENCE
from ironmoe.bench.benchmarks.roofline import Work, layer_work, limit_ms
from ironmoe.bench.benchmarks.roofline_table import LAYER, rates_in_words, roofline_rows
from ironmoe.bench.benchmarks.shapes import SHAPES, Shape

# TFLOP/s of dense bfloat16 and TB/s, as the documents print them: half of what holds with
# sparsity, an eighth of a machine with eight GPUs.
DATA_SHEETS = {
    "h100": (1979 / 2, 3.35),
    "h200": (1979 / 2, 4.8),
    "b200": (4500 / 2, 64 / 8),
    "a100": (624 / 2, 2.039),
    "mi300": (2614.9 / 2, 5.3),
    "rtx4090": (330.4 / 2, 1.008),
}


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_the_limit_of_a_gpu_follows_from_its_data_sheet(name):
    """T, D, F, E, K = 8192, 1024, 1024, 8, 2 with GELU: R = 16,384 rows of 2 KiB, weights of 16
    MiB, products of 2 R · 1024² FLOPs."""
    shape = Shape("hand", 8192, 1024, 1024, 8, 2, "gelu")
    rows, weights, index = 16384 * 2048, 8 * 2**20 * 2, 16384 * 4
    tflops, terabytes = DATA_SHEETS[name]
    assert GPUS[name].peak == pytest.approx((tflops, terabytes), rel=1e-4)

    products = 2 * 16384 * 1024**2 / (tflops * 1e12)
    moved = rows + index + weights + rows, rows + weights + rows
    seconds = (
        5 * index / (terabytes * 1e12)  # dispatch
        + sum(max(products, each / (terabytes * 1e12)) for each in moved)  # both products
        + (rows + 8192 * 2048 + 2 * index) / (terabytes * 1e12)  # combine
    )
    gpu = GPUS[name]
    assert limit_ms(shape, INFERENCE, gpu.peak, gpu.chip) == pytest.approx(seconds * 1e3, rel=1e-4)


def test_every_gpu_has_a_source_and_its_form():
    assert GPUS.keys() == DATA_SHEETS.keys()
    for gpu in GPUS.values():
        assert ("NVIDIA" in gpu.source or "AMD" in gpu.source) and gpu.name == gpu.name.lower()
        assert gpu.title.upper().replace(" ", "").find(gpu.name.upper()) >= 0


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_the_page_states_the_same_rates(gpu):
    page = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{gpu.name}`"))
    _, title, tflops, terabytes, _ = row.strip("| ").split(" | ")
    assert title == gpu.title and (float(tflops), float(terabytes)) == gpu.peak


def test_partial_sums_of_a_gate_follow_the_blocks_of_the_chip():
    """A row has one sum for each tile across the hidden width, which no tile exceeds."""
    shape = SHAPES[0]
    for gpu in GPUS.values():
        gate = next(w for w in layer_work(shape, DX, gpu.chip) if w.kernel == "gate gradient")
        sums = (gate.bytes - shape.rows * 8) / (shape.rows * 4)
        assert sums == int(sums) and 1 <= sums <= shape.hidden / 16


def test_what_bounds_a_kernel_depends_on_the_rates():
    work = Work("hand", flops=100 * 10**9, bytes=10**9)
    assert work.bound_at(100, 2.0) == "FLOPs" and work.ms_at(100, 2.0) == pytest.approx(1.0)
    assert work.bound_at(1000, 2.0) == "bytes" and work.ms_at(1000, 2.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("H100", ["h100"]),
        ("MI300X", ["mi300"]),
        ("rtx-4090, RTX 4090,4090", ["rtx4090"]),
        ("b200,a100", ["b200", "a100"]),
        ("ALL", list(DATA_SHEETS)),
        ("a100,all", ["a100", *(name for name in DATA_SHEETS if name != "a100")]),
    ],
)
def test_gpus_are_found_in_any_case(text, names):
    assert [gpu.name for gpu in select_gpus(text)] == names


@pytest.mark.parametrize("text", ["", "h300", "h100,", "h100 b200"])
def test_an_unknown_gpu_is_named_with_those_that_there_are(text):
    with pytest.raises(GpuError, match=r"--gpu must be names out of h100, .*, or all, got '"):
        select_gpus(text)


def test_gpus_side_by_side_are_all_taken_at_their_data_sheets():
    """A measured rate beside a data sheet would make an H100 a fifth slower than an H200."""
    h100, h200 = select_gpus("h100,h200")
    assert rates_compared((h100,), peak=False) == ((790.0, 3.0),)
    assert rates_compared((h100,), peak=True) == ((989.5, 3.35),)
    assert rates_compared((h200,), peak=False) == ((989.5, 4.8),)
    both = rates_compared((h100, h200), peak=False)
    assert both == ((989.5, 3.35), (989.5, 4.8))
    assert "790 TFLOP/s and 3 TB/s, which others have measured" in rates_in_words(
        {h100: h100.reached}
    )
    assert "launch of a kernel, a few microseconds, is not in its time" in rates_in_words(
        {h100: both[0]}
    )
    assert "measured." not in rates_in_words(dict(zip((h100, h200), both, strict=True)))


def test_rows_have_every_gpu_shape_pass_and_kernel_once():
    gpus = {gpu: gpu.peak for gpu in select_gpus("h200,a100")}
    rows = roofline_rows(SHAPES[:2], gpus, every_kernel=True)
    keys = [(row["gpu"], row["shape"], row["pass"], row["kernel"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert ("a100", SHAPES[0].name, DX, "combine, backward") in keys
    layers = roofline_rows(SHAPES[:2], gpus, every_kernel=False)
    assert [row for row in rows if row["kernel"] == LAYER] == layers and len(layers) == 2 * 2 * 5
    for layer in layers:
        kernels = [
            row["ms"]
            for row in rows
            if row["kernel"] != LAYER and all(row[k] == layer[k] for k in ("gpu", "shape", "pass"))
        ]
        assert layer["ms"] == pytest.approx(sum(kernels))


def test_the_static_model_names_its_machines_as_the_roofline_does():
    assert {machine.name.lower() for machine in MACHINES.values()} <= GPUS.keys()
