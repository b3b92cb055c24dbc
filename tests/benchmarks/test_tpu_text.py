"""Parsing the output of the TPU compiler, on pieces of such text."""

import pytest

from benchmarks.tpu_compiler import CHIPS, seconds
from benchmarks.tpu_text import Array, Program, Work, parse_arrays, parse_instruction

MAIN = """HloModule jit_f, is_scheduled=true

%fused_dot (p.0: bf16[8,64], p.1: s4[64,32]) -> bf16[8,32] {{
  %p.0 = bf16[8,64]{{1,0:T(8,128)(2,1)}} parameter(0)
  %p.1 = s4[64,32]{{1,0:T(64,128)(8,1)E(4)}} parameter(1)
  ROOT %dot = bf16[8,32]{{1,0}} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}}

%fused_slice (p.2: s8[16,64,32], p.3: s32[]) -> s8[1,64,32] {{
  %p.3 = s32[] parameter(1)
  %p.2 = s8[16,64,32]{{2,1,0}} parameter(0)
  %view = s8[16,64,32]{{2,1,0}} fusion(%p.2), kind=kLoop, calls=%fused_view
  ROOT %s = s8[1,64,32]{{2,1,0}} dynamic-slice(%view, %p.3), dynamic_slice_sizes={{1,64,32}}
}}

%fused_update (p.4: f32[16,32], p.5: f32[1,32], p.6: s32[]) -> f32[16,32] {{
  %p.4 = f32[16,32]{{1,0}} parameter(0)
  %p.5 = f32[1,32]{{1,0}} parameter(1)
  %p.6 = s32[] parameter(2)
  ROOT %u = f32[16,32]{{1,0}} dynamic-update-slice(%p.4, %p.5, %p.6)
}}

%fused_scatter (p.9: f32[16,32], p.10: f32[1,32], p.11: s32[]) -> f32[16,32] {{
  %p.9 = f32[16,32]{{1,0}} parameter(0)
  %p.10 = f32[1,32]{{1,0}} parameter(1)
  %p.11 = s32[] parameter(2)
  ROOT %sc = f32[16,32]{{1,0}} scatter(%p.9, %p.11, %p.10), update_window_dims={{1}}
}}

%fused_gather (p.12: f32[16,32], p.13: s32[2]) -> f32[2,32] {{
  %p.12 = f32[16,32]{{1,0}} parameter(0)
  %p.13 = s32[2] parameter(1)
  ROOT %g = f32[2,32]{{1,0}} gather(%p.12, %p.13), offset_dims={{1}}, slice_sizes={{1,32}}
}}

%fused_view (p.7: s8[16,64,32]) -> s8[16,64,32] {{
  %p.7 = s8[16,64,32]{{2,1,0}} parameter(0)
  %bits = s8[16,64,32]{{2,1,0}} bitcast(%p.7)
  ROOT %v = s8[16,64,32]{{2,1,0:T(8,128)(4,1)}} copy(%bits)
}}

%fused_whole (p.8: s8[16,64,32]) -> s8[16,64,32] {{
  %p.8 = s8[16,64,32]{{2,1,0}} parameter(0)
  %viewed = s8[16,64,32]{{2,1,0}} fusion(%p.8), kind=kLoop, calls=%fused_view
  ROOT %n = s8[16,64,32]{{2,1,0}} negate(%viewed)
}}

%condition (c: (s32[], s8[16,64,32])) -> pred[] {{
  %c = (s32[], s8[16,64,32]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[]{{:T(128)}} constant(16)
  ROOT %less = pred[] compare(%i, %limit), direction={direction}
}}

%body (b: (s32[], s8[16,64,32])) -> (s32[], s8[16,64,32]) {{
  %b = (s32[], s8[16,64,32]{{2,1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%b), index=0
  %w = s8[16,64,32]{{2,1,0}} get-tuple-element(%b), index=1
  %slice = s8[1,64,32]{{2,1,0:S(1)}} fusion(%w, %i.1), kind=kLoop, calls=%fused_slice
  ROOT %t = (s32[], s8[16,64,32]{{2,1,0}}) tuple(%i.1, %w)
}}

ENTRY %main (x: bf16[8,64], w: s4[64,32], a: f32[16,32], b: f32[1,32]) -> bf16[8,32] {{
{lines}
}}
"""
PARAMETERS = """  %x = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %w = s4[64,32]{1,0:T(64,128)(8,1)E(4)} parameter(1)
  %a = f32[16,32]{1,0} parameter(2)
  %b = f32[1,32]{1,0} parameter(3)
  %near = f32[16,32]{1,0:S(1)} parameter(4)
  %i = s32[] parameter(5)
  %many = s8[16,64,32]{2,1,0} parameter(7)
  %loop = (s32[], s8[16,64,32]{2,1,0}) parameter(6)
"""


def works(line, direction="LT"):
    return Program(MAIN.format(lines=PARAMETERS + line, direction=direction)).work()


def only(line, **options):
    (work,) = works(line, **options)
    return work


def test_arrays_know_their_bytes_and_memory_space():
    text = "(s4[64,32]{1,0:T(64,128)(8,1)E(4)}, bf16[8]{0:T(256)(128)(2,1)S(1)}, pred[], s4[3])"
    arrays = parse_arrays(text)
    assert arrays[:2] == (Array("s4", (64, 32)), Array("bf16", (8,), is_on_chip=True))
    assert [a.bytes for a in arrays] == [1024, 16, 1, 2]
    assert [a.hbm_bytes for a in arrays] == [1024, 0, 1, 2]


def test_a_fusion_has_cycles_and_the_bytes_of_operands_and_results():
    line = '  %f = bf16[8,32]{1,0} fusion(%x, %w), calls=%fused_dot, c={"estimated_cycles":"123"}'
    work = only(line)
    assert (work.name, work.opcode, work.cycles) == ("f", "fusion", 123)
    assert work.hbm_bytes == 8 * 64 * 2 + 64 * 32 // 2 + 8 * 32 * 2


@pytest.mark.parametrize("fused", ["whole", "view"])
def test_an_operand_that_is_used_through_a_view_is_read_as_a_whole(fused):
    call = f"fusion(%many), kind=kLoop, calls=%fused_{fused}"
    assert only(f"  %f = s8[16,64,32]{{2,1,0:S(1)}} {call}").hbm_bytes == 16 * 64 * 32


def test_only_what_is_gathered_is_read():
    line = "  %g = f32[2,32]{1,0:S(1)} fusion(%a, %near), kind=kLoop, calls=%fused_gather"
    assert only(line).hbm_bytes == 2 * 32 * 4


def test_on_chip_arrays_cause_no_hbm_traffic():
    assert only("  %c = f32[16,32]{1,0:S(1)} copy(%near)").hbm_bytes == 0
    assert only("  %c = f32[16,32]{1,0} copy(%near)").hbm_bytes == 16 * 32 * 4


@pytest.mark.parametrize(("place", "size"), [("", 2 * 128), (":S(1)", 0)])
@pytest.mark.parametrize("call", ["dynamic-update-slice(%t, %s, %i)", "scatter(%t, %i, %s)"])
def test_an_update_in_place_reads_and_writes_what_changes(call, place, size):
    s = f"  %s = f32[1,32]{{1,0{place}}} custom-call(%i)"
    t = f"  %t = f32[16,32]{{1,0{place}}} custom-call(%i)"
    *_, work = works("\n".join([s, t, f"  %u = f32[16,32]{{1,0{place}}} {call}"]))
    assert (work.name, work.hbm_bytes) == ("u", size)


@pytest.mark.parametrize(
    "result, size",
    [
        ("(f32[16,32]{1,0:S(1)}, f32[16,32]{1,0}, u32[]{:S(2)})", 2048),
        ("(f32[4,32]{1,0:S(1)}, f32[16,32]{1,0}, u32[]{:S(2)})", 512),
        ("(f32[16,32]{1,0}, f32[16,32]{1,0}, u32[]{:S(2)})", 4096),
    ],
)
def test_an_asynchronous_copy_counts_reads_and_writes(result, size):
    lines = f"  %s = {result} copy-start(%a)\n  %d = f32[16,32]{{1,0:S(1)}} copy-done(%s)"
    assert only(lines).hbm_bytes == size
    assert only(lines).opcode == "copy-start"


def test_views_and_waiting_are_not_work():
    lines = ["%t = (f32[16,32]{1,0}) tuple(%a)", "%v = f32[512]{0} bitcast(%a)"]
    assert works("\n".join(f"  {line}" for line in lines)) == []


LOOP = "  %l = (s32[], s8[16,64,32]{2,1,0}) while(%loop), condition=%condition, body=%body"


def test_a_loop_counts_its_trips_and_only_the_slices_of_a_sliced_operand():
    work = only(LOOP)
    assert (work.name, work.times, work.trips_are_known) == ("slice", 16, True)
    # One slice and the index.
    assert work.hbm_bytes == 64 * 32 + 4


def test_the_compilers_annotated_trip_count_comes_first():
    noted = LOOP + ', backend_config={"known_trip_count":{"n":"3"}}'
    assert only(noted).times == 3
    assert only(noted, direction="NE").times == 3


def test_an_unknown_trip_count_is_reported():
    work = only(LOOP, direction="NE")
    assert (work.times, work.trips_are_known) == (1, False)


@pytest.mark.parametrize("fused", ["update", "scatter"])
def test_an_in_place_update_reads_and_writes_only_the_update(fused):
    line = f"  %f = f32[16,32]{{1,0}} fusion(%a, %b, %i), kind=kLoop, calls=%fused_{fused}"
    assert only(line).hbm_bytes == 2 * 32 * 4 + 4


def test_a_pallas_kernel_is_a_count():
    target = 'custom_call_target="tpu_custom_call"'
    cost = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":32768,"x":"1"}}}'
    work = only(f"  %k = bf16[8,32]{{1,0}} custom-call(%x, %w), {target}, {cost}")
    assert (work.is_kernel, work.cycles, work.operations) == (True, None, 32768)
    assert work.hbm_bytes == 1024 + 1024 + 512
    assert not only("  %k = bf16[8,32]{1,0} custom-call(%x)").is_kernel
    # It says that it reads and writes a part of its operands.
    for accessed, found in ((700, 700), (9999, 1024 + 1024 + 512)):
        part = cost.replace('"x":"1"', f'"bytes_accessed":"{accessed}"')
        line = f"  %k = bf16[8,32]{{1,0}} custom-call(%x, %w), {target}, {part}"
        assert only(line).hbm_bytes == found


def test_a_kernel_that_reads_floats_of_8_bits_converts_them():
    read = "  %f = f8e4m3fn[64,32]{1,0} parameter(2)\n"
    line, target = "  %k = bf16[8,32]{1,0} custom-call(", 'custom_call_target="tpu_custom_call"'
    work = works(f"{read}{line}%x, %f), {target}")[-1]
    assert work.cycles == 2 * (1024 + 2048 + 512) // 1024
    assert works(f"{read}{line}%x, %w), {target}")[-1].cycles is None
    assert works(f"{read}{line}%x, %f)")[-1].cycles is None


def test_an_operation_takes_the_longer_of_compute_and_transfer():
    chip = CHIPS["v5e"]
    assert seconds(chip, Work("f", "fusion", 1_500_000, 0)) == pytest.approx(1e-3)
    assert seconds(chip, Work("f", "fusion", 1, 819_000_000)) == pytest.approx(1e-3)
    for moved, operations in ((8, 197 * 10**9), (819_000_000, 1)):
        kernel = Work("k", "custom-call", None, moved, operations=operations, is_kernel=True)
        assert seconds(chip, kernel) == pytest.approx(1e-3)


def test_the_roofline_is_the_longer_of_transfer_and_compute():
    chip = CHIPS["v5e"]
    assert chip.limit(819_000_000, 1, "bf16") == pytest.approx(1e-3)
    assert chip.limit(1, 394 * 10**9, "int8") == pytest.approx(1e-3)
    # v5e has no float8 arithmetic: bfloat16's rate.
    assert chip.limit(1, 197 * 10**9, "fp8") == pytest.approx(1e-3)


def test_other_text_raises():
    with pytest.raises(ValueError, match="must have an ENTRY computation; got 'module"):
        Program("module @jit_f {}")
    with pytest.raises(ValueError, match="must have an opcode before a bracket; got 'f32"):
        parse_instruction("x", "f32[8]")
