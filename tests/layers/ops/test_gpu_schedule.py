"""What a GPU's machine code says: excerpts in nvdisasm's form, and the files that hold the code."""

import pathlib
import struct
import sys

import pytest

BENCH = pathlib.Path(__file__).parents[3] / "bench"
sys.path.append(str(BENCH))

import cubin  # noqa: E402
import sass  # noqa: E402


def code(*lines):
    """Text as of ``nvdisasm -c -hex``: labels, and (instruction, stall, signs, reads, waits)."""
    text, address = ["kernel:", ".text.kernel:"], 0
    for line in lines:
        if isinstance(line, str) and line.startswith("."):
            text.append(f"{line}:")
            continue
        line = (line,) if isinstance(line, str) else line
        what, stall, signs, reads, waits = (*line, *(1, 7, 7, 0)[len(line) - 1 :])
        control = (stall | 1 << 4 | signs << 5 | reads << 8 | waits << 11) << 41
        text.append(f"        /*{address:04x}*/     {what} ;       /* 0x{0xFC7947:016x} */")
        text.append(" " * 60 + f"/* 0x{control:016x} */")
        address += 16
    return sass.read("\n".join(text))


LOOP = (
    "LDG.E.128 R4, desc[UR4][R2.64]",
    ".L_x_0",
    ("LDS.64 R8, [R3]", 2, 0, 7, 0),
    ("HMMA.16816.F32.BF16 R8, R8, R10, R12", 4, 7, 7, 0b1),
    ("@!P0 BRA `(.L_x_1)", 5),
    *["FADD R4, R4, R5"] * 100,
    ".L_x_1",
    ("MUFU.EX2 R6, R6", 1, 1, 7, 0),
    ("STL [R1], R6", 1, 7, 7, 0b10),
    ("@P1 BRA `(.L_x_0)", 5),
    ("EXIT", 5),
    ".L_x_2",
    "BRA `(.L_x_2)",
    "NOP",
    "NOP",
)


def test_loops_and_long_branches_are_regions():
    read = code(*LOOP)
    assert len(read.instructions) == 108  # without what lies behind EXIT
    assert read.regions == (sass.Region(1, 106, True), sass.Region(4, 103, False))
    first = read.instructions[2]
    assert (first.name, first.stall, first.signs, first.waits) == ("HMMA", 4, None, (0,))
    assert [x.predicate for x in read.instructions if x.name == "BRA"] == ["@!P0", "@P1"]


def test_instructions_count_as_often_as_they_run():
    total = sass.totals(code(*LOOP), (8, 0.25))
    assert total.instructions == 2 + 8 * (6 + 0.25 * 100)
    assert (total.classes["fma"], total.classes["HMMA"], total.classes["spill"]) == (200, 8, 8)
    assert total.flops == 8 * 2 * 16 * 8 * 16
    # A quarter of 2048 multiply-adds a cycle, and half of that for the older instruction.
    assert total.pipes["tensor"] == 8 * 16 * 8 * 16 / 256
    assert total.pipes["xu"] == 8 * 8
    assert (total.shared_bytes, total.spill_bytes, total.global_bytes) == (8 * 256, 8 * 128, 512)
    assert total.pipes["l1"] == 4 * (8 * 256 + 8 * 128 + 512) / 128


def test_a_number_for_each_region():
    with pytest.raises(ValueError, match="1 numbers for 2 regions"):
        sass.totals(code(*LOOP), (8,))


def test_one_warp_waits_for_what_it_loads():
    read = code(("LDS R8, [R3]", 2, 0, 7, 0), ("FADD R4, R8, R5", 4, 7, 7, 0b1), ("EXIT", 1))
    assert sass.alone(read, ()) == sass.LATENCY["LDS"] + 4 + 1
    free = code(("LDS R8, [R3]", 2, 0, 7, 0), ("FADD R4, R8, R5", 4, 7, 7, 0b10), ("EXIT", 1))
    assert sass.alone(free, ()) == 2 + 4 + 1


def test_one_warp_waits_for_copies_and_products():
    copy = "LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64]"
    waits = [copy, "LDGDEPBAR", copy, "LDGDEPBAR", "DEPBAR.LE SB0, 0x1", "EXIT"]
    assert sass.alone(code(*waits), ()) == sass.LATENCY["LDGSTS"] + 2
    waits[-2] = "DEPBAR.LE SB0, 0x0"
    assert sass.alone(code(*waits), ()) == sass.LATENCY["LDGSTS"] + 4
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8].tnspB, R24"
    read = code(product, product, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT")
    assert sass.alone(read, ()) == 2 * 64 * 64 * 16 / 2048 + sass.LATENCY["HGMMA"] + 2
    # Rows of the left factor, 16 of a warp, and a quarter of the right one.
    assert sass.product(read.instructions[0]) == (16 * 64 * 16, 32, 16 * 16 * 2 + 64 * 16 * 2 / 4)


def test_steady_turns_of_a_loop_wait_for_the_turn_before():
    read = code(
        ".L_x_0",
        ("FADD R4, R8, R5", 1, 7, 7, 0b1),
        ("LDS R8, [R3]", 1, 0, 7, 0),
        ("@P0 BRA `(.L_x_0)", 1),
        "EXIT",
    )
    turn = sass.LATENCY["LDS"] + 1
    assert sass.alone(read, (1,)) == 4
    assert sass.alone(read, (5,)) == 4 + 4 * turn


SEQUENCE = """\
000: kCommandBuffer [source | sink] 
    001: kCustomKernel [source       | next=002 (1)] kda_score__1 grid: [512, 32, 1] \
threads: [128, 1, 1]  shared_memory: 16384 bytes
    002: kCustomKernel [prev=001 (1) | sink        ] loop_fusion grid: [256, 1, 1] \
threads: [64, 2, 1]  shared_memory: 0 bytes
"""
METADATA = """\
thunk_metadata {
  thunk_info {
    profile_annotation: "pallas_call.12"
    thunk_id: 1
  }
  thunk_kind: "kCustomKernel"
}
"""


def test_launches_are_read_from_the_dump(tmp_path):
    (tmp_path / "module_0001.jit_f.thunk_sequence.txt").write_text(SEQUENCE)
    with pytest.raises(ValueError, match="0 dumps of a thunk_metadata"):
        cubin.launches(tmp_path)
    (tmp_path / "module_0001.jit_f.thunk_metadata.txt").write_text(METADATA)
    assert cubin.launches(tmp_path) == [
        cubin.Launch("kda_score__1", "pallas_call.12", 512 * 32, 128, 16384),
        cubin.Launch("loop_fusion", "loop_fusion", 256, 128, 0),
    ]


def test_snappy():
    # A literal, a copy of it twice over (it overlaps itself), a copy with a 2-byte offset.
    packed = bytes([15, 2 << 2, *b"abc", (8 - 4) << 2 | 1, 3, 3 << 2 | 2, 3, 0])
    assert cubin.snappy(packed) == b"abc" * 5
    with pytest.raises(ValueError, match="15 bytes of 16"):
        cubin.snappy(b"\x10" + packed[1:])


def riegeli(*records, snappy=False):
    """A file of these records in one chunk, each shorter than 16 KiB."""

    def number(x):
        return bytes([x]) if x < 128 else bytes([x & 127 | 128, x >> 7])

    def pack(x):  # as a literal; the size stands before it twice
        return 2 * number(len(x)) + bytes([len(x) - 1 << 2]) + x if snappy else x

    sizes, values = pack(b"".join(number(len(x)) for x in records)), pack(b"".join(records))
    chunk = (b"s" if snappy else b"\0") + number(len(sizes)) + sizes + values
    first, head = (
        struct.pack("<8xQ8xB15x", size, ord(kind)) for size, kind in ((0, "s"), (len(chunk), "r"))
    )
    return bytes.fromhex("83af70d10d884a3f") + bytes(16) + first + head + chunk


@pytest.mark.parametrize("snappy", [False, True])
def test_records_of_a_file_inside_a_file(snappy):
    inner = riegeli(b"one", b"", b"three", snappy=snappy)
    file = b"header" + riegeli(b"first", inner, b"last")
    assert list(cubin._all_records(file)) == [b"first", b"one", b"", b"three", b"last"]
    with pytest.raises(ValueError, match="no Riegeli file"):
        list(cubin._all_records(b"header"))
