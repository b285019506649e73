"""The report of a small shearing: what it says, and that a browser draws all of it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shear_tron import cli
from shear_tron.pruning import reached
from shear_tron.report.gates import frames
from shear_tron.report.story import TOLERANCE, read
from shear_tron.train import metrics

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A pruning run and its continuation."""
    folder = tmp_path_factory.mktemp("runs")
    prune = [str(world / "prune.yaml"), "train.steps=8", "prune.warmup_steps=3", f"run={folder}/prune"]
    assert cli.main(["train", *prune]) == 0
    assert cli.main(["extract", f"{folder}/prune", f"{folder}/small"]) == 0
    go_on = [str(world / "prune.yaml"), f"run={folder}/continue", f"model={folder}/small", "prune=null"]
    assert cli.main(["train", *go_on, "train.steps=5"]) == 0
    sample = {"prompt": "red", "text": " </script><script>console.error('escaped?')</script>"}
    (folder / "continue" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return f"{folder}/prune", f"{folder}/continue"


@pytest.fixture(scope="module")
def page(runs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    assert cli.main(["report", *runs, "--baseline", runs[0], "--output", str(folder / "report.html")]) == 0
    return folder / "report.html"


def data(page: Path) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    return dict(json.loads(found))


def test_the_page_needs_no_network(page: Path) -> None:
    markup = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.S)
    assert "<script" not in markup
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import""", markup)
    assert "http" not in json.dumps(data(page)).replace("https://vega.github.io/schema/", "")


def test_the_page_says_what_became_of_the_model(page: Path, runs: tuple[str, str]) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.S)))
    before, after = metrics.read_references(Path(runs[0])), metrics.read(Path(runs[1]))[-1]["held_out"]
    for losses in (before, after):
        assert all(f"{loss:.3f}" in text for loss in losses.values())
    assert "117 k → 39.1 k" in text  # parameters
    assert "4 of 4 missed" in text
    assert f"more than {TOLERANCE * 100:.0f} % of its units" in " ".join(text.split())
    assert "console.error('escaped?')" in text


def test_tokens_go_on_counting_from_run_to_run(runs: tuple[str, str]) -> None:
    prune, go_on = read([Path(run) for run in runs], []).stages
    assert [line["tokens"] // (8 * 16) for line in (*prune.lines, *go_on.lines)] == list(range(1, 14))


def test_a_run_is_told_from_before_its_first_step(runs: tuple[str, str]) -> None:
    """The model that continues is the one that pruning ended with."""
    prune, go_on = read([Path(run) for run in runs], []).stages
    assert prune.held_out is not None
    step, tokens, losses = go_on.evaluations[0]
    assert (step, tokens) == (0, prune.last["tokens"])
    assert losses == pytest.approx(prune.held_out, abs=1e-5)
    assert read([Path(runs[1])], []).table()[0] == ("source", losses)


def test_a_miss_is_further_from_the_target_than_the_tolerance(runs: tuple[str, str]) -> None:
    (stage,) = read([Path(runs[0])], []).stages
    for end in stage.misses:
        key = f"{end.kind}_sparsity" if end.kind else "sparsity"
        gap = abs(stage.last[f"expected_{key}"] - stage.last[f"target_{key}"])
        assert end.missed == (gap > TOLERANCE)
    assert reached.TOLERANCE == TOLERANCE  # what `train` and `extract` call a miss
    assert [end.kind for end in stage.misses] == ["", "hidden", "layers", "heads_per_group", "ffn"]


def test_a_head_acts_where_its_own_gate_and_its_layers_are_open(runs: tuple[str, str]) -> None:
    (stage,) = read([Path(runs[0])], []).stages
    snapshot, frame = stage.gates[-1], frames(stage)[-1]
    assert len(stage.gates) == 8
    for layer, row in enumerate(frame["heads"]):
        assert len(row) == 12  # 4 groups of 3
        expected = [snapshot["layers"][layer] * chance for chance in snapshot["heads_per_group"][layer]] * 4
        assert row == pytest.approx(expected, abs=6e-4)


def test_a_run_that_goes_on_can_be_reported(runs: tuple[str, str], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "running")
    for name in (metrics.LOG, metrics.GATES):
        text = (tmp_path / "running" / name).read_text()
        (tmp_path / "running" / name).write_text(text[:-40])
    assert cli.main(["report", str(tmp_path / "running")]) == 0
    text = (tmp_path / "running" / "report.html").read_text()
    assert "step 7 of 8" in text
    assert "steps for another" in text
    assert "missed by" not in text


def test_a_log_of_an_older_version_is_reported_with_what_it_has(runs: tuple[str, str], tmp_path: Path) -> None:
    run = tmp_path / "old"
    shutil.copytree(runs[0], run)
    (run / metrics.GATES).unlink()
    new = ("tokens", "multipliers", "tflops_per_rank", "peak_memory", "time", "flops")
    lines = [{key: value for key, value in line.items() if key not in new} for line in metrics.read(run)]
    (run / metrics.LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["report", str(run)]) == 0
    assert "sparsity-ffn" in data(run / "report.html")["charts"]


def test_steps_that_were_skipped_are_told(runs: tuple[str, str], tmp_path: Path) -> None:
    run = tmp_path / "skipping"
    shutil.copytree(runs[0], run)
    lines = metrics.read_lines(run / metrics.LOG)
    lines[3] |= {"loss": None, "skipped": "loss is nan in trees"}
    (run / metrics.LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["report", str(run)]) == 0
    assert "1 of 8 steps, where something was not finite" in (run / "report.html").read_text()


def test_figures_for_papers(runs: tuple[str, str], tmp_path: Path) -> None:
    assert cli.main(["report", *runs, "--output", str(tmp_path / "r.html"), "--png", str(tmp_path / "png")]) == 0
    names = {file.stem for file in (tmp_path / "png").iterdir()}
    assert names >= {"loss", "excess", "mixture", "sparsity", "gates", "multiplier-linear", "speed", "time"}
    for name in names:
        assert (tmp_path / "png" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / "png" / f"{name}.svg").read_text()


def test_what_cannot_be_told_is_said_in_one_line(
    runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    assert cli.main(["report", *reversed(runs)]) == 2
    assert "give runs in the order in which they were made" in capsys.readouterr().err


# Written into the page's title: what a reader would see go wrong.
INSPECT = """<script type="module">
while (!document.body.dataset.drawn) await new Promise((later) => setTimeout(later, 50));
const clipped = [], empty = [];
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg");
  if (!svg || svg.querySelectorAll("path,rect,text").length < 5) { empty.push(chart.id); continue; }
  const edge = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll("text")) {
    const box = text.getBoundingClientRect();
    const shown = text.textContent && getComputedStyle(text).opacity !== "0" && text.getAttribute("opacity") !== "0";
    if (shown && (box.left < edge.left - 1 || box.right > edge.right + 1 || text.textContent.endsWith("…")))
      clipped.push(chart.id + ": " + text.textContent);
  }
}
const root = document.documentElement;
document.title = JSON.stringify({ drawn: document.body.dataset.drawn, clipped, empty,
  ground: getComputedStyle(document.body).backgroundColor, overflow: root.scrollWidth - root.clientWidth });
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_draws_all_of_it(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    assert CHROMIUM is not None
    (tmp_path / "page.html").write_text(INSPECT.join(page.read_text().rsplit("</body>", 1)))
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "dump-dom", "enable-logging=stderr", "hide-scrollbars"]
    flags += [f"user-data-dir={tmp_path}/profile", f"window-size={width},2000", "virtual-time-budget=20000"]
    flags += [f"blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [CHROMIUM, *(f"--{flag}" for flag in flags), (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    seen = json.loads(html.unescape(title))
    assert seen == {"drawn": "yes", "clipped": [], "empty": [], "overflow": 0, "ground": seen["ground"]}
    assert seen["ground"] == ("rgb(14, 17, 22)" if dark else "rgb(246, 247, 249)")
