"""Single instructions against what the PTX manual says of them: 32 threads, each with numbers of
its own.
"""

import numpy as np
import pytest
from ptx.machine import run
from ptx.memory import Memory
from ptx.program import Program
from ptx.reports import Reports

KERNEL = """
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)
.reqntid 32
{{
    mov.u32 %r1, %tid.x;
    ld.param.b64 %rd1, [k_param_0];
    mad.wide.u32 %rd2, %r1, 16, %rd1;
    ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd2];
    {code}
    ld.param.b64 %rd3, [k_param_1];
    mad.wide.u32 %rd4, %r1, 4, %rd3;
    st.global.b32 [%rd4], %r6;
    ret;
}}
"""
LANES = np.arange(32, dtype=np.uint32)
WORDS = np.array(
    [0, 1, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFF, 0x00F0, 0x12345678, 0xDEADBEEF], np.uint32
)
X, Y = np.repeat(WORDS, 8)[:32], np.tile(WORDS, 8)[:32]


def result(code, *operands):
    """%r6 of each thread after ``code``, where %r2, %r3, … hold ``operands``, one number a thread
    or one for all.
    """
    loaded = np.zeros((32, 4), np.uint32)
    for i, operand in enumerate(operands):
        loaded[:, i] = (
            np.asarray(operand).view(np.uint32) if isinstance(operand, np.ndarray) else operand
        )
    stored, reports = np.zeros(32, np.uint32), Reports()
    memory = Memory(reports)
    memory.add(1 << 32, loaded.view(np.uint8).reshape(-1), "loaded")
    memory.add(2 << 32, stored.view(np.uint8), "stored")
    run(
        Program(KERNEL.format(code=code)),
        memory,
        {"k_param_0": 1 << 32, "k_param_1": 2 << 32},
        1,
        0,
        {},
        reports,
    )
    assert not reports.texts
    return stored


def signed(words):
    return [int(word) for word in words.view(np.int32)]


def truncated(x, y):
    """x / y towards zero."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.s32 %r6, %r2, %r3;", lambda x, y: x + y),
        ("sub.s32 %r6, %r2, %r3;", lambda x, y: x - y),
        ("mul.lo.s32 %r6, %r2, %r3;", lambda x, y: x * y),
        ("mul.hi.s32 %r6, %r2, %r3;", lambda x, y: x * y >> 32),
        ("mul.hi.u32 %r6, %r2, %r3;", lambda x, y: (x % 2**32) * (y % 2**32) >> 32),
        ("mad.lo.s32 %r6, %r2, %r3, 7;", lambda x, y: x * y + 7),
        ("max.s32 %r6, %r2, %r3;", max),
        ("min.u32 %r6, %r2, %r3;", lambda x, y: min(x % 2**32, y % 2**32)),
        ("div.s32 %r6, %r2, %r3;", lambda x, y: truncated(x, y) if y else None),
        ("rem.s32 %r6, %r2, %r3;", lambda x, y: x - truncated(x, y) * y if y else None),
        ("div.u32 %r6, %r2, %r3;", lambda x, y: (x % 2**32) // (y % 2**32) if y else None),
        ("and.b32 %r6, %r2, %r3;", lambda x, y: x & y),
        ("xor.b32 %r6, %r2, %r3;", lambda x, y: x ^ y),
        ("not.b32 %r6, %r2;", lambda x, y: ~x),
        ("neg.s32 %r6, %r2;", lambda x, y: -x),
        ("shl.b32 %r6, %r2, 5;", lambda x, y: x << 5),
        ("shl.b32 %r6, %r2, 32;", lambda x, y: 0),
        ("shr.s32 %r6, %r2, 40;", lambda x, y: x >> 31),
        ("shr.u32 %r6, %r2, 9;", lambda x, y: x % 2**32 >> 9),
        ("bfe.u32 %r6, %r2, 4, 8;", lambda x, y: x >> 4 & 255),
        ("bfe.s32 %r6, %r2, 4, 8;", lambda x, y: ((x >> 4 & 255) ^ 128) - 128),
        ("bfi.b32 %r6, %r2, %r3, 8, 4;", lambda x, y: y & ~0xF00 | (x & 15) << 8),
        ("prmt.b32 %r6, %r2, %r3, 0x5410U;", lambda x, y: x & 0xFFFF | (y & 0xFFFF) << 16),
        ("lop3.b32 %r6, %r2, %r3, %r4, 0xE8;", lambda x, y: x & y),
        ("popc.b32 %r6, %r2;", lambda x, y: (x % 2**32).bit_count()),
        ("clz.b32 %r6, %r2;", lambda x, y: 32 - (x % 2**32).bit_length()),
        ("bfind.u32 %r6, %r2;", lambda x, y: (x % 2**32).bit_length() - 1),
        ("brev.b32 %r6, %r2;", lambda x, y: int(f"{x % 2**32:032b}"[::-1], 2)),
        ("setp.lt.s32 %p1, %r2, %r3;\nselp.b32 %r6, 1, 2, %p1;", lambda x, y: 1 if x < y else 2),
        (
            "setp.lt.u32 %p1, %r2, %r3;\nselp.b32 %r6, 1, 2, %p1;",
            lambda x, y: 1 if x % 2**32 < y % 2**32 else 2,
        ),
        (
            "mov.b32 {%rs1, %rs2}, %r2;\nmov.b32 %r6, {%rs2, %rs1};",
            lambda x, y: x % 2**32 >> 16 | x << 16,
        ),
        # Of the lower half of a register
        ("cvt.s32.s16 %r6, %r2;", lambda x, y: ((x & 0xFFFF) ^ 0x8000) - 0x8000),
        (
            "cvt.s64.s32 %rd9, %r2;\nshr.s64 %rd9, %rd9, 36;\ncvt.u32.u64 %r6, %rd9;",
            lambda x, y: x >> 36,
        ),
    ],
)
def test_integers(code, expected):
    for got, x, y in zip(result(code, X, Y), signed(X), signed(Y), strict=True):
        value = expected(x, y)
        assert value is None or int(got) == value % 2**32, (x, y)


FLOATS = np.array(
    [0.0, -0.0, 1.5, -2.25, np.inf, -np.inf, np.nan, 1e-40, 3e38, 2.5, -7.0, 1e-3], np.float32
)
F, G = np.resize(FLOATS, 32), np.resize(np.roll(FLOATS, 5), 32)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.f32 %r6, %r2, %r3;", lambda x, y: x + y),
        ("mul.f32 %r6, %r2, %r3;", lambda x, y: x * y),
        (
            "mul.ftz.f32 %r6, %r2, 0f3F800000;",
            lambda x, y: np.where(np.abs(x) < 2.0**-126, 0 * x, x),
        ),
        ("div.rn.f32 %r6, %r2, %r3;", lambda x, y: x / y),
        ("sqrt.rn.f32 %r6, %r2;", lambda x, y: np.sqrt(x)),
        ("ex2.approx.f32 %r6, %r2;", lambda x, y: np.exp2(x.astype(np.float64)).astype(np.float32)),
        ("max.f32 %r6, %r2, %r3;", lambda x, y: np.fmax(x, y)),
        ("max.NaN.f32 %r6, %r2, %r3;", lambda x, y: np.maximum(x, y)),
        ("abs.f32 %r6, %r2;", lambda x, y: np.abs(x)),
        ("cvt.rn.bf16x2.f32 %r6, %r3, %r2;\nshl.b32 %r6, %r6, 16;", lambda x, y: nearest_bfloat(x)),
        (
            "cvt.rn.f16.f32 %rs1, %r2;\ncvt.f32.f16 %r6, %rs1;",
            lambda x, y: x.astype(np.float16).astype(np.float32),
        ),
        (
            "setp.ltu.f32 %p1, %r2, %r3;\nselp.f32 %r6, %r2, %r3, %p1;",
            lambda x, y: np.where((x < y) | np.isnan(x + y), x, y),
        ),
    ],
)
def test_floats(code, expected):
    with np.errstate(all="ignore"):
        want = expected(F, G)
        if "setp" in code:  # +inf − inf is no number, though both are
            want = np.where((F < G) | np.isnan(F) | np.isnan(G), F, G)
    np.testing.assert_array_equal(result(code, F, G).view(np.float32), want)


def nearest_bfloat(x):
    """By looking at both neighbours."""
    down = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    up = (down.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    closer = np.abs(up.astype(np.float64) - x) < np.abs(x - down.astype(np.float64))
    return np.where(np.isfinite(x) & closer, up, down)


def test_zeros_have_an_order():
    plus, minus = np.zeros(32, np.float32), np.full(32, -0.0, np.float32)
    for code, x, y, negative in (
        ("max", plus, minus, False),
        ("max", minus, plus, False),
        ("min", plus, minus, True),
    ):
        assert (
            np.signbit(result(f"{code}.f32 %r6, %r2, %r3;", x, y).view(np.float32)) == negative
        ).all()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("shfl.sync.bfly.b32 %r6, %r2, 5, 31, -1;", X[LANES ^ 5]),
        ("shfl.sync.up.b32 %r6, %r2, 3, 0, -1;", np.where(LANES < 3, X, np.roll(X, 3))),
        ("shfl.sync.down.b32 %r6, %r2, 3, 31, -1;", np.where(LANES > 28, X, np.roll(X, -3))),
        ("shfl.sync.idx.b32 %r6, %r2, 9, 31, -1;", np.full(32, X[9])),
        ("shfl.sync.idx.b32 %r6, %r2, 1, 6175, -1;", X[LANES // 8 * 8 + 1]),  # segments of 8 lanes
        ("redux.sync.add.s32 %r6, %r2, -1;", np.full(32, X.sum(dtype=np.uint32))),
        ("redux.sync.max.u32 %r6, %r2, -1;", np.full(32, X.max())),
        ("redux.sync.min.s32 %r6, %r2, -1;", np.full(32, X.view(np.int32).min()).view(np.uint32)),
        (
            "setp.gt.u32 %p1, %r1, 7;\nvote.sync.ballot.b32 %r6, %p1, -1;",
            np.full(32, 0xFFFFFF00, np.uint32),
        ),
        (
            "match.any.sync.b32 %r6, %r2, -1;",
            np.array([sum(1 << j for j in range(32) if X[j] == x) for x in X], np.uint32),
        ),
    ],
)
def test_warps(code, expected):
    np.testing.assert_array_equal(result(code, X), expected)


def test_threads_that_branch_apart_meet_again():
    """The lower half goes another way, inside of it lane 3 leaves for good, and every lane loops as
    often as its number says.
    """
    code = """
    mov.u32 %r6, 0;
    setp.ge.u32 %p1, %r1, 16;
    @%p1 bra $L_upper;
    setp.eq.u32 %p2, %r1, 3;
    @%p2 ret;
    add.s32 %r6, %r6, 1000;
    bra.uni $L_both;
$L_upper:
    add.s32 %r6, %r6, 2000;
$L_both:
    mov.u32 %r7, 0;
$L_loop:
    setp.ge.u32 %p3, %r7, %r1;
    @%p3 bra $L_end;
    add.s32 %r7, %r7, 1;
    add.s32 %r6, %r6, 1;
    bra.uni $L_loop;
$L_end:
    """
    expected = np.where(LANES == 3, 0, LANES + np.where(LANES < 16, 1000, 2000))
    np.testing.assert_array_equal(result(code), expected)
