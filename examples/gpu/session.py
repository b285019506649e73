"""All that a lent GPU should answer, in order of value and in under 25 minutes: `make gpu`.

    python examples/gpu/session.py [--out runs/gpu] [--only PART] [--toy]

Parts: laws, resume, kernels, dense 1.3B, pruning step, shearing (parts.py). Each is a process of its own with a limit,
so that one that breaks costs its own answer only. After each part OUT/rows.jsonl has its rows and OUT/summary.md the
page to read; docs/gpu.md says what was predicted. ``--toy``: every part on a CPU in toy sizes, in this process, for CI.
Imports neither datatrove nor nanotron.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
for folder in (ROOT, ROOT / "kernels", ROOT / "examples" / "benchmarks", HERE):
    sys.path.insert(0, str(folder))

import parts as measured  # noqa: E402

BUDGET = 25 * 60  # seconds


def run(name: str, session: measured.Session) -> None:
    """Run one part here and append what it found."""
    function, _ = measured.PARTS[name]
    began, found = time.perf_counter(), {"part": name, "status": "ok"}
    try:
        found["rows"] = function(session)
    except measured.NotHere as reason:
        found |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        found |= {"status": "failed", "reason": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    append(session.out, found | {"seconds": round(time.perf_counter() - began, 1)})


def append(out: Path, found: dict[str, object]) -> None:
    with (out / "rows.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")


def summary(out: Path, device: str) -> str:
    """One page: a heading and a table a part."""
    lines = [f"# A session on {device}", ""]
    for found in map(json.loads, (out / "rows.jsonl").read_text().splitlines()):
        lines += [f"## {found['part']}: {found['status']}, {found['seconds']} s", ""]
        if "reason" in found:
            lines += [found["reason"].splitlines()[0], ""]
        rows = found.get("rows", [])
        if rows:
            same = {key for key in rows[0] if len(rows) > 1 and len({str(row.get(key)) for row in rows}) == 1}
            if same:
                lines += [", ".join(f"{key} {rows[0][key]}" for key in rows[0] if key in same), ""]
            keys = [key for key in rows[0] if key not in same]
            table = [keys, ["---"] * len(keys), *([str(row.get(key, "")) for key in keys] for row in rows)]
            lines += ["| " + " | ".join(cells) + " |" for cells in table] + [""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2/model"), help="of the part shearing")
    parser.add_argument("--data", type=Path, default=Path("runs/smollm2/data"), help="prepared with its tokenizer")
    parser.add_argument("--only", choices=measured.PARTS, help="one part, in this process")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(argv)
    if not options.toy and not measured.torch.cuda.is_available():
        print("no CUDA device here; --toy runs every part in toy sizes on the CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    session = measured.Session(options.out.resolve(), options.toy, options.model.resolve(), options.data.resolve())
    if options.only:
        run(options.only, session)
        return 0
    (options.out / "rows.jsonl").unlink(missing_ok=True)
    device = "a CPU, in toy sizes" if options.toy else measured.torch.cuda.get_device_name()
    began = time.perf_counter()
    for name, (_, limit) in measured.PARTS.items():
        left = BUDGET - (time.perf_counter() - began)
        print(f"{name}: up to {min(limit, left):.0f} s", flush=True)
        if options.toy:
            run(name, session)
        else:
            given = sys.argv[1:] if argv is None else list(argv)
            try:
                command = [sys.executable, __file__, *given, "--only", name]
                status = subprocess.run(command, timeout=max(1.0, min(limit, left))).returncode
                reason = f"its process ended with status {status}" if status else None
            except subprocess.TimeoutExpired:
                reason = f"not done within {min(limit, left):.0f} s"
            if reason:
                append(session.out, {"part": name, "status": "failed", "reason": reason, "seconds": "-"})
        (session.out / "summary.md").write_text(summary(session.out, device))
    print(f"{session.out / 'summary.md'}: done in {time.perf_counter() - began:.0f} s")
    return int("failed" in {json.loads(line)["status"] for line in (session.out / "rows.jsonl").open()})


if __name__ == "__main__":
    sys.exit(main())
