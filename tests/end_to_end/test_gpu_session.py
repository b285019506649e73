"""`make gpu` without a GPU: every part in toy sizes, where neither datatrove nor nanotron can be imported."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = {
    "laws": "skipped", "resume": "ok", "kernels": "skipped", "dense 1.3B": "ok", "pruning step": "ok", "shearing": "ok"
}  # fmt: skip
WITHOUT = """
import runpy, sys
sys.modules["datatrove"] = sys.modules["nanotron"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_session_runs_whole_in_toy_sizes(tmp_path: Path) -> None:
    made = tmp_path / "resume"  # the part resume leaves a model and data, which the part shearing takes
    command = [
        "examples/gpu/session.py",
        "--toy",
        "--out",
        tmp_path,
        "--model",
        made / "model",
        "--data",
        made / "data",
    ]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["part"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert {part: row["status"] for part, row in found.items()} == PARTS, found
    assert found["resume"]["rows"][0]["same weights and moments, to the bit"]
    assert [row["checkpointing"] for row in found["dense 1.3B"]["rows"]] == ["none", "selective"]
    settings = [(row["gates"], row["step"]) for row in found["pruning step"]["rows"]]
    assert settings == [(g, s) for g in ("open", "halfway", "closed") for s in ("dense", "masked", "compact")]
    assert len((tmp_path / "shearing.jsonl").read_text().splitlines()) >= found["shearing"]["rows"][0]["steps"] == 6
    page = (tmp_path / "summary.md").read_text()
    assert all(f"## {part}: {status}" in page for part, status in PARTS.items())
    assert len(page.splitlines()) < 80
