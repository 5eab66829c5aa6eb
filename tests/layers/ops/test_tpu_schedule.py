"""Cycles from the compiler's dumps: excerpts in their form, and a kernel for an absent chip."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

BENCH = pathlib.Path(__file__).parents[3] / "bench"
sys.path.append(str(BENCH))

import hlo  # noqa: E402
import plan  # noqa: E402
import schedule  # noqa: E402
import workload  # noqa: E402

# A pipeline of 4 steps (6 turns), and in each a loop of 5 turns, which waits two cycles for a load.
# After a branch, two more bundles.
NEST = """\
= control target key start
LH: loop header
LB: loop body
= control target key end

     0   :  { %s9_s0 = smov 0 /* copy for cssa */  ;;  %s4_s1 = smov 2 } /* Start region 1 */
   0x1 LB: > { %s8_s0 = sphi %s9_s0, %s7_s0 /* stage = 0 */ } /* Start region 2 :: Start region 3 */
   0x2   : > { %s5_s2 = sadd.s32 4294967295, %s8_s0 /* iteration index, stage = 1 */ }
   0x3   : > { %p1_p0 = scmp.ge.s32.totalorder %s8_s0, 1  ;;  %p2_p1 = scmp.lt.s32 %s8_s0, 5 }
   0x4   : > { %p3_p2 = pnand %p1_p0, %p2_p1 }
   0x5   : > { %12 = sbr.rel (%p3_p2) target bundleno = 16 (0x10), region = 9 }
   0x6   :  {}
   0x7   :  {} /* End region 5 */
   0x8 LB: >> { %s11_s4 = sphi %s4_s1, %s10_s4 } /* Start region 6 :: Start region 7 */
   0x9   : >> { %s10_s4 = sadd.s32 2, %s11_s4  ;;  %v1_v0 = vld [vmem:[%s3_s3] sm:$0xff]
second_minor_factor: 1 */ }
   0xa   :  {}
   0xb   :  {}
   0xc   : >> { %p4_p3 = scmp.ge.s32.totalorder %s10_s4, 12 /* loop exit test */ }
   0xd   : > { %13 = sbr.rel (!%p4_p3) target bundleno = 8 (0x8), region = 6 }
   0xe   : >> { %14 = vst [vmem:[%s3_s3] sm:$0xff] /*vst_source=*/%v1_v0 } /* End region 6 */
   0xf   :  {} /* End region 7 */
  0x10 PF: > { %s7_s0 = sadd.s32 1, %s8_s0 /* copy for cssa */ } /* Start/End empty region 9 */
  0x11   : > { %p5_p4 = scmp.ge.s32.totalorder %s7_s0, 6 /* loop exit test */ }
  0x12   :  { %15 = sbr.rel (!%p5_p4) target bundleno = 1 (0x1), region = 2 }
  0x13   : > { %16 = vnop } /* End region 2 */
  0x14   :  {} /* End region 3 */
  0x15   :  { %17 = vsyncpa [#allocation4], 1 } /* End region 1 */
"""
INNER, OUTER, ALL = range(0x8, 0x10), range(0x1, 0x15), range(0x16)
SPILLED = (
    NEST.replace("%s7_s0 = sadd.s32 1, %s8_s0", "%s6_s9 = sadd.s32 1, %s8_s0")
    .replace("%s3_s3] sm:$0xff]\n", "%s3_s3]  ;;  %19 = sst [smem:[#allocation7_spill]] %s6_s9\n")
    .replace("vnop", "vnop  ;;  %s7_s0 = sld [smem:[#allocation7_spill]]")
)
UNITS = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"


def utilization(rows):
    lines = ["== CAPACTIY:", UNITS, "4 3 4 2 1 3 3 1 1 2", "== UTILIZATION:"]
    return "\n".join([*lines, *(" ".join(map(str, row)) for row in rows)]) + "\n"


def slots(bundles=0x16):
    """An MXU slot in every bundle of the inner loop, a fill in the others of the outer one."""
    for i in range(bundles):
        row = [0] * 10
        row[0] = int(i in INNER)
        row[6] = int(i in OUTER and i not in INNER)
        yield row


@pytest.mark.parametrize("text", [NEST, SPILLED], ids=["as_it_is", "counter_spilled"])
def test_bundles_count_as_often_as_their_loops_turn(text):
    bundles, found = schedule.loops(text)
    assert bundles == len(ALL)
    spans = {(loop.first, loop.last, loop.trips) for loop in found}
    assert spans == {(0x8, 0xF, 5), (0x1, 0x14, 4)}
    read = schedule.schedule(text, utilization(slots()))
    body = len(OUTER) + 4 * len(INNER)
    assert (read.body, read.trips) == (body, 4)
    assert read.cycles == read.at_least == 4 * body + 2
    assert read.share["MXU"] == pytest.approx(5 * len(INNER) / (4 * body), abs=1e-4)
    assert (read.spills, read.fills) == (0, len(OUTER) - len(INNER))


def test_what_turns_an_unknown_number_of_times_is_not_guessed():
    text = NEST.replace("%s10_s4, 12 /*", "%s10_s4, %s2_s7 /*")
    read = schedule.schedule(text, utilization(slots()))
    assert (read.cycles, read.body, read.trips) == (None, None, 4)
    assert read.at_least == 4 * len(OUTER) + 2
    # A pipeline without a guard that can be read.
    text = NEST.replace("pnand", "por")
    assert {loop.trips for loop in schedule.loops(text)[1]} == {5, None}


def test_turns_that_are_assumed_count_and_so_do_the_arms_of_a_turn():
    """Two conditions in the inner loop, each around one bundle of products."""
    text = NEST.replace("%s10_s4, 12 /*", "%s10_s4, %s2_s7 /*")
    text = text.replace(
        "0x9   : >> {", "0x9   : >> { %8 = sbr.rel (%p8_p8) target bundleno = 11  ;; "
    )
    text = text.replace("0xb   :  {", "0xb   :  { %9 = sbr.rel (!%p8_p8) target bundleno = 13 ")
    all_ways = schedule.Assumed("five of each", (4 * 5,))
    read = schedule.schedule(text, utilization(slots()), all_ways)
    known = schedule.schedule(NEST, utilization(slots()))
    for name in ("cycles", "at_least", "body", "trips", "share", "spills", "fills"):
        assert getattr(read, name) == getattr(known, name)
    assert [(arm.first, arm.last, arm.mxu) for arm in read.arms] == [(0xA, 0xA, 1), (0xC, 0xC, 1)]
    assert known.arms == () and [loop.first for loop in read.unknown] == [0x8]
    one_way = schedule.Assumed("mostly the second", (4 * 5,), (2, 18))
    read = schedule.schedule(text, utilization(slots()), one_way)
    assert read.cycles == known.cycles - (20 - 2) - (20 - 18)
    with pytest.raises(ValueError, match="longer"):
        schedule.schedule(text, utilization(slots()), schedule.Assumed("", (1, 2)))


@pytest.mark.parametrize(("core", "cores"), [("scmp.ne", 1), ("scmp.lt", 2)])
def test_a_second_core_that_only_ends_shares_nothing(core, cores):
    start = "%s9_s0 = smov 0 /* copy for cssa */"
    asks = f"%s0_s9 = sld [smem:[#a]] /* megacore core id :: core id */  ;;  {start}"
    asks += f"  ;;  %p0_p0 = {core}.s32.totalorder %s0_s9, 0"
    asks += "  ;;  %7 = sbr.rel (%p0_p0) target bundleno = 21 (0x15)"
    assert schedule.schedule(NEST.replace(start, asks), utilization(slots())).cores == cores
    assert schedule.schedule(NEST, utilization(slots())).cores == 1


def test_files_of_two_kernels_are_an_error():
    with pytest.raises(ValueError, match="22 bundles, but slots of 21"):
        schedule.schedule(NEST, utilization(slots(21)))


HLO = """\
HloModule jit_f, is_scheduled=true

%fused.1 (p.1: f32[8,128]) -> f32[8,128] {
  %p.1 = f32[8,128]{1,0} parameter(0)
  ROOT %neg.1 = f32[8,128]{1,0} negate(%p.1)
}

%fused.2 (p.2: f32[8,128]) -> f32[8,128] {
  %p.2 = f32[8,128]{1,0} parameter(0)
  ROOT %neg.2 = f32[8,128]{1,0} negate(%p.2), metadata={op_name="another"}
}

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[]{:T(128)}, f32[8,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%state), index=1
  %one = s32[]{:T(128)} constant(1)
  %old = s32[]{:T(128)} copy(%i)
  %next = s32[]{:T(128)} add(%old, %one)
  %y.2 = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused.2, metadata={op_name="b"}
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0}) tuple(%next, %y.2)
}

%condition (state.1: (s32[], f32[8,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8,128]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %nine = s32[]{:T(128)} constant(9)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %nine), direction=LT
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %start = s32[]{:T(128)} copy(%two)
  %y.1 = f32[8,128]{1,0} fusion(%a), kind=kLoop, calls=%fused.1, metadata={op_name="a"}
  %k.1 = (bf16[8,128]{1,0}, f32[8,128]{1,0:T(8,128)S(1)}) custom-call(%y.1), target="kernel"
  %aside = ((), s32[1]{0:S(2)}) call-start(), async_execution_thread="sparsecore"
  %k.2 = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%k.1), index=1
  %begin = (s32[]{:T(128)}, f32[8,128]{1,0}) tuple(%start, /*index=1*/%k.2)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0}) while(%begin), condition=%condition, body=%body
  ROOT %end = f32[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""
TOP = """\
     0   :  { %1 = inlined_call /* <late-initialization> */ }
   0x1   :  { %2 = inlined_call %s1_s0, %s2_s1 /* %y.1 = fusion(%a) */ }
   0x2   :  { %3 = inlined_call %s1_s0, %s2_s1 /* %k.1 = custom-call(%y.1) */ }
   0x3   :  { %4 = inlined_call %s1_s0, %s2_s1 /* %y.2 = fusion(%x) */ }
"""


def dump(folder, parts):
    for name in (*parts, "TLP", "<late-initialization>"):
        text = TOP if name == "TLP" else NEST
        files = {
            "00-schedule-analysis_packed-bundles-post-ra": "total",
            "01-packed-bundles-post-ra": text,
            "02-pre-delay_hlo-static-per-bundle-utilization": utilization(slots()),
            "03-final_bundles": "as the delays have replaced what is empty",
        }
        for label, content in files.items():
            (folder / f"123-{name}-{label}.txt").write_text(content)


def test_a_program_is_the_sum_of_its_parts_and_their_loops(tmp_path):
    """y.2 is y.1 again, and was not compiled; it is in a loop from 2 to 9."""
    dump(tmp_path, ["y.1", "k.1"])
    once = schedule.schedule(NEST, utilization(slots())).cycles
    found = plan.program(HLO, tmp_path)
    runs = {use.instruction.name: (use.runs, use.cycles) for use in found.uses}
    assert runs == {"y.1": (1, once), "k.1": (1, once), "y.2": (7, 7 * once)}
    assert (found.cycles, found.at_least, found.unknown) == (9 * once, 9 * once, [])
    assert found.elsewhere == ("aside",)
    array = 8 * 128 * 4
    assert found.hbm_bytes == 2 * array
    assert found.uses[1].hbm_bytes == array + array // 2  # what is in VMEM is not counted


def test_a_program_with_an_unknown_part_has_no_sum(tmp_path):
    dump(tmp_path, ["y.1"])
    found = plan.program(HLO.replace("direction=LT", "direction=NE"), tmp_path)
    once = schedule.schedule(NEST, utilization(slots())).cycles
    assert (found.cycles, found.at_least, found.unknown) == (None, 2 * once, ["k.1", "y.2"])
    with pytest.raises(ValueError, match=r"y\.2 is called and not in the program"):
        plan.program(HLO.replace("%y.2", "%z.2"), tmp_path)


def test_a_loop_and_a_kernel_of_unknown_turns_are_asked_about(tmp_path):
    dump(tmp_path, ["y.1", "k.1"])
    unknown = NEST.replace("%s10_s4, 12 /*", "%s10_s4, %s2_s7 /*")
    (tmp_path / "123-k.1-01-packed-bundles-post-ra.txt").write_text(unknown)
    asked = []

    def assume(instruction, found):
        asked.append((instruction.name, found and found.trips))
        return schedule.Assumed("the caches are full", (20 if found else 3,))

    found = plan.program(HLO.replace("direction=LT", "direction=NE"), tmp_path, assume)
    once = schedule.schedule(NEST, utilization(slots())).cycles
    assert asked == [("loop", None), ("k.1", 4)]
    assert (found.cycles, found.unknown) == ((1 + 1 + 3) * once, [])
    assert found.assumed == ("the caches are full",)


def test_metadata_on_lines_of_its_own_is_the_kernels():
    more = 'target="kernel", frontend_attributes={kernel_metadata={\n"block":2048\n}}, last=1'
    computations, entry = hlo.parse(HLO.replace('target="kernel"', more))
    assert '"block":2048}}, last=1' in computations[entry]["k.1"].rest
    assert list(computations[entry]) == list(hlo.parse(HLO)[0][entry])


def test_the_compilers_own_count_of_turns_comes_first():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"5"},"known_init_step":{}}'
    computations, entry = hlo.parse(HLO.replace("body=%body", known))
    loop = computations[entry]["loop"]
    assert hlo.while_trips(computations, entry, loop) == 5
    for change in (("add(%old", "multiply(%old"), ("constant(9)", "parameter(1)")):
        computations, entry = hlo.parse(HLO.replace(*change))
        loop = computations[entry]["loop"]
        assert hlo.while_trips(computations, entry, loop) is None


SIZES = np.asarray([5, 0, 27, 16, 1, 15])


def kernel(rest, kind="bf16[64,32]{1,0}", name="gmm.1"):
    shapes = "operand_layout_constraints={s32[6]{0}, bf16[64,48]{1,0}, bf16[6,48,32]{2,1,0}}"
    rest = f'custom_call_target="tpu_custom_call", {shapes}, {rest}'
    return hlo.Instruction(name, kind, "custom-call", (), rest, False)


def planned(loops, arms=(), cores=1):
    loops = tuple(schedule.Loop(i, i, None) for i in range(loops))
    arms = tuple(schedule.Arm(0, 0, *arm) for arm in arms)
    return schedule.Schedule(9, None, 9, None, None, {}, 0, 0, loops, arms, cores)


@pytest.mark.parametrize("empty", [False, True])
def test_visits_of_aligned_tiles_are_the_pairs_of_tile_and_group(empty):
    owners = np.repeat(np.arange(len(SIZES)), SIZES)
    for tile in (4, 16, 64):
        pairs = len({(group, row // tile) for row, group in enumerate(owners)})
        assert workload.aligned_visits(SIZES, tile, empty) == pairs + int(empty)


def test_a_kernels_tiles_say_how_often_its_loops_turn():
    assume = workload.grouped_product(SIZES)
    own = kernel('frontend_attributes={ragged_dot_tiling="16,48,16"}')
    visits = workload.aligned_visits(SIZES, 16, False)
    assert assume(own, planned(1)).turns == (2 * visits,)
    assert assume(own, planned(1, cores=2)).turns == (visits,)
    assert "16 x 48 x 16" in assume(own, planned(1)).what
    by_group = kernel('frontend_attributes={ragged_dot_tiling="16,24,32"}', "bf16[6,48,32]")
    assert assume(by_group, planned(1)).turns == (2 * (visits + 1),)
    # A sum in three parts: the last of them has more to do.
    parts = kernel('xprof_metadata={"tile_m": 16, "tile_k": 16, "tile_n": 32}')
    found = assume(parts, planned(1, [(8, 5), (8, 3)]))
    assert (found.turns, found.arms) == ((3 * visits,), (visits, 2 * visits))
    # What does not say, or does not fit, is left alone.
    assert assume(kernel(""), planned(1)) is None
    assert assume(own, planned(2)) is None
    assert assume(own, None) is None


def test_tiles_that_begin_with_a_group_count_in_buckets():
    """Tiles of 16 rows, sublanes of 4: rows 0-4; 5-19, from 4 on; 20-31; 32-47; 48; 49-63."""
    assert workload.own_visits(SIZES, 16, 4).tolist() == [5, 16, 12, 16, 1, 16]
    tiles = '"dims.size_lhs_sublane":4, "tiles.bucket_base":8, "tiles.tile_k":48, "tiles.tile_m":16'
    tiles += ', "tiles.tile_n":16'
    arms = [(32, 1), (32, 2), (16, 1)]
    found = workload.grouped_product(SIZES)(kernel(tiles), planned(3, arms))
    assert found.turns == (6, 6, 12)
    # Two visits of at most 8 rows, four of more, in two cases; each for both halves of the columns.
    assert found.arms == (4, 4, 4)


def test_full_caches_turn_over_all_their_blocks():
    assume = workload.full_caches(4, 4096)
    block = '"block":"512", "splits":"1"'
    arms = [(8, 9), (8, 3)]
    assert assume(kernel(block), planned(1, arms)).turns == (4 * 8,)
    assert assume(kernel(block), planned(1, arms)).arms == (0, 4 * 8)
    assert assume(kernel(block), planned(1, arms, cores=2)).turns == (2 * 8,)
    # A last block that is not full, of rows in two halves.
    found = workload.full_caches(3, 4000)(kernel('"block":"512", "splits":"2"'), planned(1, arms))
    assert (found.turns, found.arms) == ((3 * 2 * 4,), (3, 3 * 2 * 4 - 3))
    assert assume(kernel("a kernel that does not say"), planned(1)) is None
    assert assume(kernel("a loop of XLA's form"), None).turns == (4096 // 512,)


TOY = """
import json, os, sys, tempfile
sys.path.append(sys.argv[1])
import plan, schedule
folder = tempfile.mkdtemp(dir=sys.argv[2])
os.environ["LIBTPU_INIT_ARGS"] = schedule.arguments(folder)
import jax, jax.numpy as jnp, pathlib, report
from jax.experimental import pallas as pl
from jaxalope.sharding import absent_devices

jax.config.update("jax_enable_compilation_cache", False)

def measure(topology, kernel, inputs, rows, dtype):
    device = absent_devices(topology)[0]
    shape = jax.ShapeDtypeStruct((rows, 5, 128, 128), dtype)
    block = pl.BlockSpec((None, None, 128, 128), lambda i, j: (i, j, 0, 0))
    call = pl.pallas_call(kernel, grid=(rows, 5), in_specs=[block] * inputs, out_specs=block,
                          out_shape=shape, name="toy")
    text = report.compile_for(device, lambda *x: call(*x), *[shape] * inputs).as_text()
    found = plan.program(text, folder)
    use, = (u for u in found.uses if u.instruction.opcode == "custom-call")
    s = use.schedule
    for path in pathlib.Path(folder).iterdir():
        path.unlink()
    return {"steps": s.trips, "body": s.body, "cycles": s.cycles, "program": found.cycles}

def loop(x, o):
    o[...] = jax.lax.fori_loop(0, 7, lambda i, c: c @ c + i.astype(c.dtype), x[...])

def product(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype)

def chain(a, b, c, o):
    o[...] = product(product(a[...], b[...]), c[...])

def apart(a, b, c, o):
    o[...] = product(a[...], b[...]) + product(a[...], c[...])

out = [measure("v5e:2x2", loop, 1, rows, jnp.float32) for rows in (3, 6)]
out += [measure(chip, kernel, 3, 3, jnp.bfloat16) for chip in ("v5e:2x2", "tpu7x:2x2x1")
        for kernel in (chain, apart)]
print(json.dumps(out))
"""


@pytest.mark.long
def test_steps_and_cycles_of_kernels_for_absent_chips(tmp_path):
    """In a process of its own: libtpu reads where to write when it is loaded."""
    pytest.importorskip("libtpu")
    done = subprocess.run(
        [sys.executable, "-c", TOY, str(BENCH), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    small, large, *pairs = json.loads(done.stdout.splitlines()[-1])
    assert (small["steps"], large["steps"]) == (15, 30)
    # The inner loop's 7 turns, of three bfloat16 products or six, each 128 rows of 8 a bundle.
    assert small["body"] > 7 * 128 * 3 / 8
    assert large["body"] == pytest.approx(small["body"], rel=0.02)
    assert large["cycles"] == pytest.approx(2 * small["cycles"], rel=0.02)
    assert large["program"] >= large["cycles"]
    # What depends on a product waits until it has left the MXU: about 130 cycles, 210 on TPU7x.
    for chain, apart, wait in zip(pairs[::2], pairs[1::2], (100, 170), strict=True):
        assert chain["steps"] == apart["steps"] == 15
        assert chain["body"] > apart["body"] + wait
