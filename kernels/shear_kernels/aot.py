# mypy: disable-error-code="no-untyped-call"
"""Compile every kernel for GPUs that are not here, and read off what came out: ``python -m shear_kernels.aot``.

Each kernel, in every block configuration that the ops can choose, goes through Triton and the ``ptxas`` in its wheel to
a cubin for sm_80, sm_90 and sm_100, with no GPU and no CUDA toolkit. The table gives registers a thread, local-memory
instructions (spills), shared memory, and from the disassembly which of the spills lie in loops, which matrix
instruction, the length of its shortest loop and how many 16-byte loads and stores there are. ``--check FILE`` fails on
a spill in a loop, on too much shared memory, or when FILE is out of date.
"""

import argparse
import csv
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import shear_kernels
from shear_kernels.aot_cases import Case, cases

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory a block may have, bytes, by architecture (CUDA C++ programming guide, compute capabilities)."""

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
MATRIX = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b")
LOCAL = re.compile(r"\b(STL|LDL)\b")
WIDE_LOAD = re.compile(r"\b(LDG|LDGSTS)\.[\w.]*128\b")
WIDE_STORE = re.compile(r"\bSTG\.[\w.]*128\b")


@dataclass(frozen=True)
class Row:
    """What one kernel in one configuration compiles to on one architecture."""

    kernel: str
    case: str
    arch: int
    warps: int
    stages: int
    registers: int
    spills: int  # local-memory instructions
    loop_spills: int  # of them inside an innermost loop: those outside are executed once, or once a query head
    loop: int  # instructions of the shortest loop with a matrix product: what a thread issues for a tile without a mask
    shared_bytes: int
    matrix: str  # matrix instructions in the code, "-" for none
    wide_loads: int  # 16-byte loads from global memory, in the code
    wide_stores: int
    source: str  # hash of the kernel's source and configuration
    triton: str


def source_hash(case: Case) -> str:
    """Changes when the code of the kernel's module, of what it calls, or its configuration changes; not with comments
    between functions."""
    functions = [
        f for name in case.modules for f in vars(sys.modules[name]).values() if isinstance(f, triton.JITFunction)
    ]
    text = "\n".join(sorted({f.src for f in functions})) + repr(
        (case.signature, case.constants, case.warps, case.stages)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[dict[int, str]]:
    """The instructions, by address, of every innermost loop of a disassembly: from where a branch jumps back to, up to
    it, with no such loop within."""
    found = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(sass)]
    spans = []
    for at, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [{at: name for at, name, _ in found if low <= at <= high} for low, high in inner]


def compile_case(case: Case, arch: int) -> Row:
    """Compile and disassemble; no GPU is touched."""
    divisible = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(case.signature.values()) if kind[0] in "*i"}
    source = ASTSource(case.function, signature=case.signature, constexprs=case.constants, attrs=divisible)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        registers = re.search(r"REG:(\d+)", _tool("cuobjdump", "--dump-resource-usage", file.name))
        sass = _tool("cuobjdump", "-sass", file.name)
    if registers is None:
        raise ValueError(f"cuobjdump gave no register count for {case.kernel} on sm_{arch}; try another triton wheel")
    inside = loops(sass)
    return Row(
        kernel=case.kernel,
        case=case.name,
        arch=arch,
        warps=case.warps,
        stages=case.stages,
        registers=int(registers[1]),
        spills=len(LOCAL.findall(sass)),
        loop_spills=len({at for loop in inside for at, name in loop.items() if LOCAL.match(name)}),
        loop=min((len(loop) for loop in inside if any(map(MATRIX.match, loop.values()))), default=0),
        shared_bytes=compiled.metadata.shared,
        matrix="+".join(sorted(set(MATRIX.findall(sass)))) or "-",
        wide_loads=len(WIDE_LOAD.findall(sass)),
        wide_stores=len(WIDE_STORE.findall(sass)),
        source=source_hash(case),
        triton=triton.__version__,
    )


def _compile_numbered(job: tuple[int, int]) -> Row:
    return compile_case(cases(job[1])[job[0]], job[1])


def table(only: str = "", archs: Iterable[int] = tuple(SHARED_LIMIT), jobs: int = 2) -> list[Row]:
    """Rows of all cases whose "kernel case" contains ``only``, compiled in ``jobs`` processes."""
    wanted = [(i, a) for a in archs for i, c in enumerate(cases(a)) if only in f"{c.kernel} {c.name}"]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_numbered, wanted, chunksize=3))


def complaints(rows: Iterable[Row]) -> list[str]:
    """One line for every kernel that spills inside a loop and every block that does not fit the device."""
    found = []
    for r in rows:
        if r.loop_spills:
            found.append(f"{r.kernel} [{r.case}] sm_{r.arch}: {r.loop_spills} spills in loops; choose a smaller block")
        if r.shared_bytes > SHARED_LIMIT[r.arch]:
            found.append(
                f"{r.kernel} [{r.case}] sm_{r.arch}: {r.shared_bytes} bytes of shared memory exceed "
                f"{SHARED_LIMIT[r.arch]}; choose a smaller block or fewer stages"
            )
    return found


def stale(committed: Iterable[Row]) -> list[str]:
    """One line for every case whose committed row is missing or made from other source. Compiles nothing."""
    have = {(r.kernel, r.case, r.arch): r.source for r in committed}
    want = {(c.kernel, c.name, arch): source_hash(c) for arch in SHARED_LIMIT for c in cases(arch)}
    changed = [key for key in want.keys() | have.keys() if want.get(key) != have.get(key)]
    return [
        f"{k} [{c}] sm_{a}: row out of date; run python -m shear_kernels.aot --write" for k, c, a in sorted(changed)
    ]


def merged(committed: Iterable[Row], fresh: Iterable[Row]) -> list[Row]:
    """The rows of all cases, in their order: the fresh one of each, else the committed one."""
    have = {(r.kernel, r.case, r.arch): r for r in (*committed, *fresh)}
    wanted = ((c.kernel, c.name, arch) for arch in SHARED_LIMIT for c in cases(arch))
    return [have[key] for key in wanted if key in have]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        numbers = {f.name for f in fields(Row) if f.type is int}
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    for line in lines:
        line.update({name: int(line[name]) for name in numbers})
    return [Row(**line) for line in lines]


def write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)


def render(rows: Sequence[Row]) -> str:
    """The table as aligned text, without the hash."""
    names = [f.name for f in fields(Row)][:-2]
    lines = [names, *([str(getattr(r, n)) for n in names] for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shear_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="only kernels and cases whose name contains TEXT")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the table as CSV; with --only, those rows of it"
    )
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail if FILE differs from what is compiled now")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default %(default)s)")
    options = parser.parse_args(argv)
    if shear_kernels.INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it to compile")
    rows = table(options.only, jobs=options.jobs)
    print(render(rows))
    problems = complaints(rows)
    if options.write:
        write(options.write, rows if not options.only else merged(read(options.write), rows))
    if options.check:
        committed = read(options.check)
        problems += stale(committed)
        if not problems and triton.__version__ == committed[0].triton:
            have = set(committed)
            problems += [
                f"{r.kernel} [{r.case}] sm_{r.arch}: compiles otherwise than committed" for r in rows if r not in have
            ]
    print("\n".join(problems) or f"{len(rows)} rows, no spill in a loop, all within shared memory", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
