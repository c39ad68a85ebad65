"""The machine that runs PTX: what it computes against numpy, and what it refuses as a GPU would."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from _machine import Launch, Machine, Manner, Size
from _memory import Fault
from _tensor_map import TensorMap
from _text import parse

TEXT = """
.version 8.5
.target sm_90a
.address_size 64
.extern .shared .align 128 .b8 memory[];
.visible .entry kernel(.param .u64 in, .param .u64 out, .param .align 64 .b8 map[128])
{{
  .reg .pred %p<9>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .b64 %d<19>;
  ld.param.u64 %d0, [in]; ld.param.u64 %d1, [out]; mov.b64 %d2, map;
  cvta.param.u64 %d2, %d2;
  mov.u32 %r0, %tid.x; mad.wide.u32 %d4, %r0, {stride}, %d0; mad.wide.u32 %d5, %r0, 4, %d1;
  // %d4: a lane's words of the input; %d5: its word of the output, which %r1 is stored to.
  {body}
  st.global.b32 [%d5], %r1;
  ret;
}}
"""
WORDS = np.array([0, 1, 2, 31, 32, 33, 2**31 - 1, 2**31, 2**32 - 1, 0xDEADBEEF], np.uint32)
NUMBERS = np.array(
    [0.0, -0.0, 1.5, -2.25, 1e-40, 3e38, np.inf, -np.inf, np.nan, 7e-3, 0.5, -117.0], np.float32
)


def run(body, given, lanes=32, *, words=1, tensor=None, cluster=1, **manners):
    """A word of each lane; `given`: `words` of each; `tensor`: an array, its box and swizzle."""
    given = np.ascontiguousarray(given).ravel().view(np.uint32)
    out = np.zeros(lanes * cluster, np.uint32)
    arrays, described = [given, out], bytes(128)
    if tensor is not None:
        array, box, swizzle = tensor
        given_map = TensorMap(
            array.ctypes.data, array.shape[::-1], array.strides[:-1], box, array.itemsize, swizzle
        )
        assert given_map.problem() is None
        arrays, described = [*arrays, array], given_map.encoded()
    ours = [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in arrays]
    arguments = [*(struct.pack("Q", x.ctypes.data) for x in (given, out)), described]
    launch = Launch(Size(cluster), lanes, 16_384, Size(cluster))
    module = parse(TEXT.format(body=body, stride=4 * words))
    manner = Manner(allowed=lambda: ours, **manners)
    Machine(module, "kernel", launch, arguments, manner).run()
    return out


def finite_exponential(x):
    return np.exp2(np.where(np.abs(x) < 2.0**-126, 0, x))


def saturated(x):
    return np.clip(np.nan_to_num(x.astype(np.float64)), -(2**31), 2**31 - 1)


@pytest.mark.parametrize(
    ("op", "kinds", "expected"),
    [
        ("neg.f32", "ff", np.negative),
        ("abs.f32", "ff", np.abs),
        ("ex2.approx.ftz.f32", "ff", finite_exponential),
        ("cvt.rn.f32.s32", "if", lambda x: x),
        ("cvt.rzi.s32.f32", "fi", saturated),
        ("cvt.sat.f32.f32", "ff", lambda x: np.nan_to_num(np.clip(x, 0, 1))),
        ("not.b32", "uu", np.invert),
        ("cvt.rmi.f32.f32", "ff", np.floor),
    ],
)
@np.errstate(all="ignore")
def test_one_operand(op, kinds, expected):
    given = NUMBERS if kinds[0] == "f" else WORDS.view(f"{kinds[0]}4")
    found = run(f"ld.global.b32 %r9, [%d4]; {op} %r1, %r9;", given, len(given))
    wanted = np.asarray(expected(given)).astype(f"{kinds[1]}4")
    np.testing.assert_array_equal(found.view(f"{kinds[1]}4"), wanted)


@pytest.mark.parametrize(
    ("op", "kind", "expected"),
    [
        ("add.f32", "f", np.add),
        ("max.f32", "f", np.fmax),
        ("max.NaN.f32", "f", np.maximum),
        ("copysign.f32", "f", lambda a, b: np.copysign(b, a)),
        ("sub.s32", "i", np.subtract),
        ("mul.lo.s32", "i", np.multiply),
        ("mul.hi.u32", "u", lambda a, b: (a.astype("u8") * b.astype("u8")) >> np.uint64(32)),
        ("min.u32", "u", np.minimum),
        ("min.s32", "i", np.minimum),
        ("shl.b32", "u", lambda a, b: np.where(b > 31, 0, a << np.minimum(b, 31))),
        ("shr.u32", "u", lambda a, b: np.where(b > 31, 0, a >> np.minimum(b, 31))),
        ("shr.s32", "i", lambda a, b: a >> np.minimum(b.view("u4"), 31).astype("i4")),
        ("xor.b32", "u", np.bitwise_xor),
        ("cvt.rn.bf16x2.f32", "f", lambda a, b: _bfloat16(b) | _bfloat16(a) << np.uint32(16)),
    ],
)
@np.errstate(all="ignore")
def test_two_operands(op, kind, expected):
    values = NUMBERS if kind == "f" else WORDS.view(f"{kind}4")
    a, b = (x.ravel().copy() for x in np.meshgrid(values, values))
    body = f"ld.global.v2.b32 {{%r8, %r9}}, [%d4]; {op} %r1, %r8, %r9;"
    found = run(body, np.stack([a, b], 1), len(a), words=2)
    to = "u4" if op.startswith("cvt") else f"{kind}4"
    np.testing.assert_array_equal(found.view(to), expected(a, b).astype(to))


def _bfloat16(x):
    """By torch, but for the one NaN that a GPU writes."""
    bits = torch.from_numpy(x).bfloat16().view(torch.uint16).numpy().astype(np.uint32)
    return np.where(np.isnan(x), 0x7FFF, bits).astype(np.uint32)


def test_a_fused_product_rounds_once():
    a = np.float32(1 + 2.0**-12)
    given = np.array([[a, a, -1.0 - 2.0**-11]] * 32, np.float32)
    load = "ld.global.f32 %f1, [%d4]; ld.global.f32 %f2, [%d4+4]; ld.global.f32 %f3, [%d4+8];"
    found = run(f"{load} fma.rn.f32 %f4, %f1, %f2, %f3; mov.b32 %r1, %f4;", given, words=3)
    assert (found.view(np.float32) == 2.0**-24).all()


def test_lanes_part_and_meet_again():
    """Each lane counts to its own number; what follows they do together."""
    body = """
      ld.global.b32 %r2, [%d4]; mov.b32 %r1, 0;
    again:
      setp.ge.u32 %p1, %r1, %r2; @%p1 bra done;
      add.s32 %r1, %r1, 1; bra again;
    done:
      shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1; add.s32 %r1, %r1, %r3;
    """
    given = np.arange(32, dtype=np.uint32)[::-1]
    assert (run(body, given) == given + given[np.arange(32) ^ 1]).all()


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("idx", 5, 31, lambda i: np.full(32, 5)),
        ("down", 3, 31, lambda i: np.where(i + 3 < 32, i + 3, i)),
        ("up", 3, 0, lambda i: np.where(i >= 3, i - 3, i)),
        ("bfly", 4, 0x181F, lambda i: i ^ 4),
        ("idx", 1, 0x181F, lambda i: i // 8 * 8 + 1),  # in groups of eight
    ],
)
def test_shuffles(mode, by, clamp, source):
    given = np.arange(100, 132, dtype=np.uint32)
    body = f"ld.global.b32 %r2, [%d4]; shfl.sync.{mode}.b32 %r1, %r2, {by}, {clamp}, -1;"
    assert (run(body, given) == given[source(np.arange(32))]).all()


EXCHANGE = """
  ld.global.b32 %r2, [%d4]; mov.u32 %r3, memory; mad.lo.s32 %r4, %r0, 4, %r3;
  st.shared.b32 [%r4], %r2; {wait}
  xor.b32 %r5, %r0, 64; mad.lo.s32 %r5, %r5, 4, %r3; ld.shared.b32 %r1, [%r5];
"""


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_barrier_lets_warps_wait_for_one_another(seed):
    given = np.arange(128, dtype=np.uint32)
    found = run(EXCHANGE.format(wait="bar.sync 0;"), given, 128, seed=seed)
    assert (found == given ^ 64).all()


def test_a_missing_barrier_is_seen():
    given = np.arange(128, dtype=np.uint32)
    missing = run(EXCHANGE.format(wait=""), given, 128)
    assert (missing[:32] == 0xFFFFFFFF).all()  # not there yet


COPY = """
  .reg .b32 %s<9>; .reg .pred %q<3>;
  mov.u32 %s0, memory; add.s32 %s1, %s0, 8192; setp.eq.s32 %q0, %r0, 0;
  @%q0 mbarrier.init.shared::cta.b64 [%s1], 1;
  bar.sync 0;
  @%q0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s1], 2048;
  mov.b32 %s2, {left}; mov.b32 %s3, {top};
  @%q0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%s0], [%d2, {{%s2, %s3}}], [%s1];
{wait}
  mad.lo.s32 %s4, %r0, 4, %s0; ld.shared.b32 %r1, [%s4];
"""  # noqa: E501
WAIT = """
waits:
  mbarrier.try_wait.parity.shared::cta.b64 %q1, [%s1], 0; @!%q1 bra waits;
"""


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("swizzle", [0, 3])
@pytest.mark.parametrize(("left", "top"), [(0, 0), (8, 5), (-8, -3)])
def test_the_hardware_copies_a_box(left, top, swizzle, eager):
    """64 columns of 16 rows, zeros where the tensor ends; 16 bytes each change their places."""
    array = np.arange(20 * 64, dtype=np.uint16).reshape(20, 64)
    box = np.zeros((16, 64), np.uint16)
    for i in range(16):
        for j in range(64):
            if 0 <= i + top < 20 and 0 <= j + left < 64:
                box[i, j] = array[i + top, j + left]
    body = COPY.format(left=left, top=top, wait=WAIT)
    found = run(body, np.zeros(512, np.uint32), 512, tensor=(array, (64, 16), swizzle), eager=eager)
    cells = found.view(np.uint16).reshape(16, 8, 8)
    if swizzle:
        cells = np.stack([row[np.arange(8) ^ (i % 8)] for i, row in enumerate(cells)])
    assert (cells.reshape(16, 64) == box).all()


def test_what_is_not_waited_for_is_not_there():
    """Nor may a block end before."""
    array, body = np.zeros((20, 64), np.uint16), COPY.format(left=0, top=0, wait="")
    given = np.zeros(512, np.uint32)
    with pytest.raises(Fault, match="ended before the copies"):
        run(body, given, 512, tensor=(array, (64, 16), 0))
    late = run(body + "st.global.b32 [%d5], %r1;" + WAIT, given, 512, tensor=(array, (64, 16), 0))
    assert (late == 0xFFFFFFFF).all()


PRODUCT = """
  mov.u32 %r3, memory; ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d4];
  // 32 bytes a lane of a [64, 32], and of b [8, 32] behind it: rows of 64 bytes, exchanged.
  shr.u32 %r8, %r0, 2; and.b32 %r9, %r0, 3; shr.u32 %r10, %r8, 1; and.b32 %r10, %r10, 3;
  xor.b32 %r9, %r9, %r10; shl.b32 %r8, %r8, 6; shl.b32 %r9, %r9, 4; add.s32 %r8, %r8, %r9;
  add.s32 %r8, %r8, %r3; st.shared.v4.b32 [%r8], {{%r4, %r5, %r6, %r7}};
  bar.sync 0; setp.lt.u32 %p1, %r0, 128; @!%p1 bra last;
  mov.b32 %f0, 0f3F800000; mov.b32 %f1, %f0; mov.b32 %f2, %f0; mov.b32 %f3, %f0;
  setp.eq.u32 %p2, %r0, %r0;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, {a}, {b}, %p2, 1, 1, 0, 0;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, {a2}, {b2}, %p2, 1, 1, 0, 0;
  wgmma.commit_group.sync.aligned;
  {wait}
  mov.b32 %r1, %f2;
last:
"""  # noqa: E501


def descriptor(start):
    """Rows of 64 bytes, exchanged within them; eight rows are 512 bytes."""
    return start >> 4 | 1 << 16 | 512 >> 4 << 32 | 2 << 62


def products(wait):
    draw = np.random.default_rng(0)
    a, b = (draw.integers(-4, 5, size).astype(np.float32) for size in ((64, 32), (8, 32)))
    cells = np.concatenate([a, b]).view(np.uint32) >> 16  # bfloat16, exactly
    names = {f"{name}{'2' * i}": descriptor(start + 32 * i)
             for name, start in (("a", 0), ("b", 4096)) for i in range(2)}  # fmt: skip
    given = np.ascontiguousarray(cells.astype(np.uint16))
    found = run(PRODUCT.format(wait=wait, **names), given, 288, words=4)
    return found[:128].view(np.float32), a @ b.T + 1


def test_a_warp_group_multiplies():
    found, expected = products("wgmma.wait_group.sync.aligned 0;")
    lane = np.arange(128)  # the third number of each: eight rows below the first
    np.testing.assert_array_equal(
        found, expected[lane // 32 * 16 + lane % 32 // 4 + 8, lane % 4 * 2]
    )


def test_products_that_are_not_waited_for_are_not_there():
    assert np.isnan(products("")[0]).all()


def test_blocks_of_a_cluster_reach_one_another():
    """The first block's copy goes to both, and each tells the other that it has read."""
    body = """
      mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, memory; xor.b32 %r4, %r2, 1;
      setp.eq.s32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
      barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;
      mapa.shared::cluster.u32 %r5, %r3, %r4;
      @%p1 mbarrier.arrive.shared::cluster.b64 _, [%r5];
    waits:
      mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra waits;
      mov.u32 %r1, %ctaid.x; mad.wide.u32 %d5, %r1, 128, %d5;
    """
    assert (run(body, WORDS, cluster=2) == np.arange(2).repeat(32)).all()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("ld.global.b32 %r1, [%d4+4];", "belong to no tensor"),
        ("ld.global.b32 %r1, [%d4+2];", "no multiple of 4"),
        ("mov.u32 %r2, memory; st.shared.b32 [%r2+16384], %r0;", "shared memory of 16384"),
        ("setp.eq.s32 %p1, %r0, 0; @%p1 bar.sync 0;", "deadlock"),
        ("mov.u32 %r2, memory; mbarrier.arrive.shared::cta.b64 _, [%r2];", "no barrier at 0"),
        ("sin.approx.f32 %f1, %f2;", "sin.approx.f32"),
    ],
)
def test_what_stops_a_gpu_stops_it(body, said):
    with pytest.raises(Fault, match=said):
        run(body, np.zeros(32, np.uint32))
