"""Does the emulator compute what a kernel means, and does it notice what is wrong? Small kernels,
compiled, and damaged on purpose.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ptx.copy_engine import TensorMap
from ptx.machine import run
from ptx.memory import Memory
from ptx.program import Program
from ptx.reports import Fault, Reports

TERMS, BLOCK, PROGRAMS = 256, 64, 3
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton, which compiles the kernels"
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """PTX of the kernels of samples.py, from a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    script = Path(__file__).with_name("samples.py")
    return json.loads(
        subprocess.run(
            [sys.executable, script], env=environment, check=True, capture_output=True, text=True
        ).stdout
    )


def inputs(name):
    """{argument: array}, and the result in float64."""
    generator = np.random.default_rng(0)
    if name == "sums":
        x = generator.standard_normal((PROGRAMS, 512)).astype(np.float32)
        return {"x": x, "out": np.full(PROGRAMS, np.nan, np.float32)}, x.astype(np.float64).sum(1)
    x = generator.standard_normal((PROGRAMS * BLOCK, TERMS)).astype(np.float16)
    w = generator.standard_normal((TERMS, BLOCK)).astype(np.float16)
    out = np.full(
        (PROGRAMS * BLOCK, BLOCK), np.nan, np.float32 if name == "product" else np.float16
    )
    return {"x": x, "w": w, "out": out}, x.astype(np.float64) @ w.astype(np.float64)


def launch(name, sample, text=None, grid=PROGRAMS, shift=0, short=0):
    """(result, reports) of a sample, or of other text in its place.

    The result's address is shifted, its storage cut short.
    """
    reports = Reports()
    memory, maps, values = Memory(reports), {}, []
    arrays, _ = inputs(name)
    for number, (argument, array) in enumerate(arrays.items()):
        address = (number + 1) << 32
        content = array.reshape(-1).view(np.uint8)
        is_out = argument == "out"
        memory.add(address, content[: len(content) - short * is_out], argument)
        if name == "boxes":
            box, swizzle = sample["boxes"][number]
            strides = (array.shape[1], 1)
            maps[len(values)] = TensorMap(
                address, array.shape, strides, tuple(box), array.itemsize, swizzle
            )
            values += [0, *array.shape, *strides]
        else:
            values.append(address + shift * is_out)
    if name != "sums":
        values.append(TERMS)
    program = Program(text or sample["text"])
    values += [0] * (len(program.parameters) - len(values))
    run(
        program,
        memory,
        dict(zip(program.parameters, values, strict=True)),
        grid,
        sample["shared"],
        maps,
        reports,
    )
    return arrays["out"], list(reports.texts)


@pytest.mark.parametrize("name", ["product", "boxes", "sums"])
def test_values(samples, name):
    """By mma and cp.async for sm_80, wgmma and the copy engine for sm_90, shuffles and shared
    memory.
    """
    out, reports = launch(name, samples[name])
    expected = inputs(name)[1]
    rounding = 2.0**-10 if name == "boxes" else 2.0**-20
    assert reports == []
    np.testing.assert_allclose(out, expected, rtol=rounding, atol=rounding * np.abs(expected).max())


def test_the_samples_have_what_they_are_for(samples):
    for name, instructions in {
        "product": ["mma.sync", "ldmatrix", "cp.async.cg", "cp.async.wait_group", "bar.sync"],
        "boxes": [
            "wgmma.mma_async",
            "cp.async.bulk.tensor.2d.shared",
            "cp.async.bulk.tensor.2d.global",
            "mbarrier.try_wait",
        ],
        "sums": ["shfl.sync", "st.shared", "ld.shared", "bar.sync"],
    }.items():
        assert [
            instruction for instruction in instructions if instruction not in samples[name]["text"]
        ] == []


def damaged(text, instruction):
    """The text without one such instruction, for each place where one stands.

    A wait that is left out says that all has come.
    """
    instead = "mov.pred complete, 1;" if "try_wait" in instruction else ""
    lines = text.split("\n")
    for at, line in enumerate(lines):
        if re.match(rf"\s*(@!?%?\w+\s+)?{re.escape(instruction)}", line):
            yield "\n".join([*lines[:at], instead, *lines[at + 1 :]])


def is_noticed(name, sample, text):
    """A report, a fault, or numbers that are not those of the whole text."""
    try:
        out, reports = launch(name, sample, text)
    except Fault:
        return True
    return bool(reports) or not np.array_equal(out, launch(name, sample)[0])


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("product", "cp.async.wait_group"),
        ("product", "cp.async.cg"),
        ("product", "st.global"),
        ("product", "ldmatrix"),
        ("sums", "bar.sync"),
        ("sums", "st.shared"),
        ("boxes", "mbarrier.try_wait"),
        ("boxes", "mbarrier.arrive"),
        ("boxes", "cp.async.bulk.tensor"),
        ("boxes", "wgmma.wait_group"),
        ("boxes", "cp.async.bulk.wait_group"),
    ],
)
def test_a_missing_instruction_is_noticed(samples, name, instruction):
    texts = list(damaged(samples[name]["text"], instruction))
    assert texts and all(is_noticed(name, samples[name], text) for text in texts)


@pytest.mark.parametrize("name", ["product", "boxes"])
def test_a_missing_barrier_is_noticed(samples, name):
    """Any that is needed: of several in a row one is enough, and the last of all protects
    nothing."""
    texts = list(damaged(samples[name]["text"], "bar.sync"))
    without_any = re.sub(r"bar\.sync\s+0;", "", samples[name]["text"])
    assert is_noticed(name, samples[name], without_any)
    assert any(is_noticed(name, samples[name], text) for text in texts)


def reported(reports, words):
    return any(words in text for text in reports)


def test_what_is_out_of_bounds_is_noticed_and_not_written(samples):
    for name in ("product", "boxes", "sums"):
        _, reports = launch(name, samples[name], short=4)
        assert reported(reports, "out of"), name
    _, reports = launch("sums", samples["sums"], grid=PROGRAMS + 1)
    assert reported(reports, "load out of range") and reported(reports, "store out of range")


def test_a_byte_of_two_programs_is_noticed(samples):
    for name, register in (("product", "%ctaid.x"), ("boxes", "%ctaid.x")):
        text = re.sub(
            rf"mov\.u32 (\s*%r\d+), {re.escape(register)};",
            r"mov.u32 \1, 0;",
            samples[name]["text"],
        )
        assert text != samples[name]["text"]
        _, reports = launch(name, samples[name], text)
        assert reported(reports, "two programs write one byte"), name


def test_shared_memory_that_nobody_wrote_is_noticed(samples):
    text = re.sub(r"(@!?%p\d+\s+)?st\.shared\S*\s[^;]*;", "", samples["sums"]["text"])
    _, reports = launch("sums", samples["sums"], text)
    assert reported(reports, "nobody wrote")


def test_addresses_that_are_not_aligned_are_noticed(samples):
    _, reports = launch("product", samples["product"], shift=4)
    assert reported(reports, "no multiple of")


def test_unknown_instructions_are_named(samples):
    text = samples["sums"]["text"].replace("shfl.sync.bfly", "tcgen05.bfly")
    with pytest.raises(Fault, match=r"unknown instruction, line \d+: tcgen05"):
        launch("sums", samples["sums"], text)
