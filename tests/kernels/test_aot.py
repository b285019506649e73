"""What the compiler makes of the kernels, with no GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter and the compiler cannot share a process"
)
triton = pytest.importorskip("triton")
TABLE = Path(__file__).parents[2] / "kernels" / "bench" / "aot.csv"
SAMPLE = (
    "silu masked",
    "attention_keys_backward dim=128 bf16",
    "add + norm hidden<=4096",
    "heads=32/8",
    "rows, columns fp32 to bf16",
)


def test_loops_are_read_from_a_disassembly() -> None:
    """Two loops, one in the other: the inner one counts."""
    from shear_kernels import aot

    lines = ["MOV R1, R2", "LDL R3, [R1]", "HGMMA.64x64x16.F32 R4", "STL [R1], R5", "@P0 BRA 0x20", "STL [R1], R6"]
    lines += ["@!P1 BRA 0x10", "EXIT"]
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    (inner,) = aot.loops(sass)
    assert list(inner.values()) == ["HGMMA.64x64x16.F32", "STL", "BRA"]


@pytest.fixture(scope="module")
def committed() -> list:  # type: ignore[type-arg]
    from shear_kernels import aot

    return aot.read(TABLE)


def test_committed_table_is_of_this_source(committed: list) -> None:  # type: ignore[type-arg]
    """By hash of the kernels' source and of every configuration that can be chosen."""
    from shear_kernels import aot

    assert aot.stale(committed) == []
    changed = [replace(committed[0], source="0"), *committed[1:-1]]
    assert len(aot.stale(changed)) == 2  # the test can fail: one row changed, one missing


def test_no_spill_in_a_loop_and_shared_memory_fits(committed: list) -> None:  # type: ignore[type-arg]
    from shear_kernels import aot

    assert aot.complaints(committed) == []
    assert {r.arch for r in committed} == {80, 90, 100}
    bad = [replace(committed[0], loop_spills=1), replace(committed[0], shared_bytes=10**6)]
    assert len(aot.complaints(bad)) == 2


def test_matrix_instructions_and_wide_loads_are_there(committed: list) -> None:  # type: ignore[type-arg]
    """16-bit attention runs on the matrix units of each architecture; every kernel loads 16 bytes at once, and a cut
    stores so whatever it gathers from."""
    unit = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    for row in committed:
        if row.kernel.startswith("attention") and row.kernel != "attention_delta" and "bf16" in row.case:
            assert row.matrix == unit[row.arch], row
        assert row.wide_loads > 0, row
        assert row.wide_stores > 0 or not row.kernel.startswith("select"), row


def test_compiling_now_gives_the_committed_rows(committed: list) -> None:  # type: ignore[type-arg]
    """A sample, for sm_90, in a process of its own: the table is what the compiler says and not what a hand wrote."""
    code = (
        "from shear_kernels import aot\n"
        "if __name__ == '__main__':\n"
        f"    for text in {SAMPLE!r}:\n"
        "        for row in aot.table(text, archs=(90,), jobs=1): print(row)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    found = done.stdout.splitlines()
    assert len(found) >= 8
    if triton.__version__ == committed[0].triton:
        assert set(found) <= {repr(row) for row in committed}
    else:
        assert all("loop_spills=0," in line for line in found)
