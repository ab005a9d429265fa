"""Machine code is read right, and a gate says what is beyond it."""

from __future__ import annotations

from qat.ops.build import gates, sass
from qat.ops.build.gates import Gate

HEAD = "\n\tcode for sm_90a\n\t\tFunction : _ZN3qat4cuda6kernelEv\n"


def listing(*texts: str) -> list[str]:
    return HEAD.splitlines() + [f"        /*{16 * i:04x}*/     {text} ;     /* 0x0 */" for i, text in enumerate(texts)]


LOOP = [
    "S2R R0, SR_TID.X",
    "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",  # 0x10: the head
    "@P0 BRA 0x60",  # around a longer way
    "I2F.RP R3, R4",
    "MUFU.RCP R3, R3",
    "BRA 0x60",
    "IMMA.16832.U8.S8 R8, R8.ROW, R6.COL, R8",  # 0x60
    "@!P1 BRA 0x10",
    "EXIT",
]


def test_the_longest_way_through_the_main_loop():
    (kernel,) = sass.parse(listing(*LOOP))
    assert (kernel.name, kernel.arch, kernel.size) == ("kernel", "sm_90a", 16 * len(LOOP))
    loop = kernel.main_loop
    assert loop is not None and loop.products == 1 and loop.each == 7
    assert loop.opcodes["I2F"] == loop.opcodes["IMMA"] == loop.opcodes["LDGSTS"] == 1 and loop.opcodes["EXIT"] == 0


def test_each_limit_of_a_gate():
    (kernel,) = functions = sass.parse(listing(*LOOP))
    who = "kernel for sm_90a"
    wanted = [f"{who} executes 7.0 instructions a product in its main loop, more than 6"]
    wanted += [f"{who} has 1 I2F in its main loop", f"{who} has 1 MUFU in its main loop"]
    assert gates.complaints(functions, [Gate("kernel", each=6)]) == wanted
    assert gates.complaints(functions, [Gate("kernel", each=7, forbidden=())]) == []
    assert gates.complaints(functions, [Gate("kernel", each=7, size=100, forbidden=())]) == [f"{who} is 144 bytes, more than 100"]
    (narrow,) = sass.parse(listing(*[text.replace(".128", "") for text in LOOP]))
    assert gates.complaints([narrow], [Gate("kernel", 7, forbidden=())]) == [
        f"{who} has 1 copies of less than 16 bytes in its main loop"
    ]
    (straight,) = sass.parse(listing(*LOOP[:7], "EXIT"))
    assert gates.complaints([straight], [Gate("kernel", 7)]) == [f"{who} has no loop with products of the tensor cores"]
    assert gates.complaints(functions, [Gate("kernel", 9, forbidden=()), Gate("other", 1)]) == ["no kernel fits the gate other"]
    assert kernel.main_loop is not None


WRITES = [
    *LOOP[:8],
    "LDS.128 R4, [R0]",  # 0x80: the head of the loop that writes
    "@!P0 BRA 0xd0",  # around a division that checks
    "FCHK P2, R4, R5",
    "@!P2 BRA 0xd0",
    "CALL.REL.NOINC 0x100",
    "MUFU.RCP R5, R5",  # 0xd0
    "STG.E.128 [R2.64], R4",
    "@!P1 BRA 0x80",
    "EXIT",
]


def test_the_loop_that_writes_is_read_without_divisions_that_check():
    (kernel,) = functions = sass.parse(listing(*WRITES))
    assert kernel.write_loop is not None and len(kernel.write_loop.instructions) == 5
    assert kernel.main_loop is not None and kernel.main_loop.products == 1
    assert gates.complaints(functions, [Gate("kernel", 7, forbidden=(), write=5)]) == []
    too_many = "kernel for sm_90a executes 5 instructions to write 8 outputs, more than 4"
    assert gates.complaints(functions, [Gate("kernel", 7, forbidden=(), write=4)]) == [too_many]
    without = gates.complaints(sass.parse(listing(*LOOP)), [Gate("kernel", 7, forbidden=(), write=4)])
    assert without == ["kernel for sm_90a has no loop that writes its outputs"]


READS = [
    "S2R R0, SR_TID.X",
    "LDG.E.128.STRONG.GPU R4, [R2.64]",  # 0x10: the head
    "IADD3 R8, R4, R8, R9",
    "@!P1 BRA 0x10",
    "STG.E.128 [R2.64], R8",  # 0x40
    "@!P0 BRA 0x10",
    "EXIT",
]


def test_the_loop_that_reads():
    (kernel,) = functions = sass.parse(listing(*READS))
    assert kernel.main_loop is None and kernel.read_loop is not None and len(kernel.read_loop.instructions) == 3
    assert gates.complaints(functions, [Gate("kernel", None, read=3)]) == []
    who = "kernel for sm_90a"
    assert gates.complaints(functions, [Gate("kernel", None, read=2)]) == [f"{who} executes 3.0 instructions a load, more than 2"]
    narrow = sass.parse(listing(*[text.replace(".128", "") for text in READS]))
    said = [f"{who} has 1 loads of less than 16 bytes in the loop that reads"]
    assert gates.complaints(narrow, [Gate("kernel", None, read=3)]) == said
    spilled = sass.parse(listing(READS[0], "LDG.E.128 R4, [R2.64]", "LDL R4, [R1]", *READS[3:]))
    assert gates.complaints(spilled, [Gate("kernel", None, read=3)]) == [f"{who} has 1 LDL where it reads"]
    nothing = sass.parse(listing(*[text.replace("LDG", "LDS") for text in READS]))
    assert gates.complaints(nothing, [Gate("kernel", None, read=3)]) == [f"{who} has no loop that reads"]


def test_a_gate_of_one_arch_asks_nothing_of_another():
    functions = sass.parse(listing(*LOOP))
    assert (
        gates.complaints(functions, [Gate("kernel", each=6, forbidden=(), arch="sm_80"), Gate("kernel", 9, forbidden=())]) == []
    )
    wanted = ["kernel for sm_90a executes 7.0 instructions a product in its main loop, more than 6"]
    assert gates.complaints(functions, [Gate("kernel", each=6, forbidden=(), arch="sm_90a")]) == wanted
    assert gates.complaints(functions, [Gate("other", 6, arch="sm_90a")]) == ["no kernel fits the gate other"]


def test_gates_name_no_kernel_twice():
    patterns = [gate.kernel for gate in gates.GATES]
    assert len(patterns) == len(set(patterns)) > 0
