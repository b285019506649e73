"""The story as one HTML file that needs no network: figures, their data and the code that draws them are in it."""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import altair as alt
import jinja2
import vl_convert

from shear_tron.report import gates, theme
from shear_tron.report.figures import Figure, figures, verdict
from shear_tron.report.story import TOLERANCE, Stage, Story, mean
from shear_tron.report.units import SPARSITIES, duration, memory, short

_TOLERANCE = f"{100 * TOLERANCE:.0f} %"
LIBRARY = "window.vegaEmbed = vegaEmbed;"
TEMPLATES = Path(__file__).parent
SIZES = ("hidden", "layers", "heads", "kv_heads", "ffn")


def render(story: Story) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pruning = story.pruning
    maps = gates.maps(pruning) if pruning else {}
    charts = {name: _fitted(chart) for name, chart in figures(story).items()}
    charts |= {f"gates-{name}": _fitted(chart) for name, chart in maps.items()}
    frames = gates.frames(pruning) if pruning and maps else []
    themes = [theme.config(theme.LIGHT), theme.config(theme.DARK)]
    library = vl_convert.javascript_bundle(LIBRARY, vl_version=alt.SCHEMA_VERSION.rsplit(".", 1)[0])
    return environment.get_template("page.html").render(
        title=" + ".join(stage.name for stage in story.stages),
        story=story,
        pruning=pruning,
        tiles=_tiles(story),
        lineage=_lineage(story),
        sizes=SIZES,
        tolerance=_TOLERANCE,
        losses=_losses(story),
        stages=[(stage, _facts(stage)) for stage in (*story.stages, *story.baselines)],
        charts=charts,
        maps={name: gates.MAPS[name] for name in maps},
        frames=frames,
        sparsities=pruning.misses if pruning else [],
        names=SPARSITIES,
        verdict=verdict,
        samples=[(stage, sample) for stage in story.stages for sample in stage.samples],
        made=time.strftime("%Y-%m-%d %H:%M"),
        library=library.replace("</script", "<\\/script"),
        data=_json({"charts": charts, "frames": frames, "themes": themes}),
        light=theme.LIGHT,
        dark=theme.DARK,
    )


def _fitted(chart: Figure) -> dict[str, Any]:
    """As wide as the column it stands in; the page's theme colours it."""
    spec: dict[str, Any] = chart.properties(width="container").to_dict()
    for key in ("config", "title"):
        spec.pop(key, None)
    return {**spec, "autosize": {"type": "fit-x", "contains": "padding"}}


def _json(value: Any) -> str:
    """For a script element: no tag of it can end there."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _tiles(story: Story) -> list[dict[str, Any]]:
    """The answer at a glance."""
    first, last = story.stages[0], story.stages[-1]
    tiles: list[dict[str, Any]] = []
    before, after = first.facts.get("parameters"), (story.pruning or first).facts.get("target_parameters")
    if before and after:
        tiles.append(
            {"name": "parameters", "value": f"{short(before)} → {short(after)}", "note": f"{after / before:.1%} kept"}
        )
    elif before:
        tiles.append({"name": "parameters", "value": short(before), "note": ""})
    ends = [("source" if story.source_is_measured else "reference", story.source)] if story.source else []
    ends += [(stage.name, stage.held_out) for stage in story.stages if stage.held_out]
    if ends:
        tiles.append(
            {
                "name": "mean held-out loss, nats per token",
                "value": " → ".join(f"{mean(losses):.2f}" for _, losses in ends),
                "note": " → ".join(name for name, _ in ends),
            }
        )
    if story.pruning and story.pruning.finished:
        kinds = [end for end in story.pruning.misses if end.kind]
        missed = [SPARSITIES[end.kind] for end in kinds if end.missed]
        value = f"{len(missed)} of {len(kinds)} missed" if missed else f"all {len(kinds)} reached"
        note = ", ".join(missed) or f"within {_TOLERANCE} of the units of each kind"
        tiles.append({"name": "targets", "value": value, "note": note, "bad": bool(missed)})
    tokens = " + ".join(short(stage.tokens) for stage in story.stages)
    took = duration(sum(stage.seconds for stage in story.stages))
    tiles.append({"name": "tokens seen", "value": tokens, "note": f"in {took} of training steps"})
    state = "finished" if last.finished else f"step {last.last['step']:,} of {last.steps:,}"
    tiles.append({"name": last.name, "value": state, "note": _ago(last)})
    return tiles


def _ago(stage: Stage) -> str:
    when = stage.last.get("time")
    told = f"last step at {time.strftime('%Y-%m-%d %H:%M', time.localtime(when))}" if when else ""
    if stage.finished:
        return told
    left = (stage.steps - stage.last["step"]) * median(line["seconds"] for line in stage.lines)
    return f"{told}; steps for another {duration(left)}".removeprefix("; ")


def _lineage(story: Story) -> list[dict[str, Any]]:
    """Models from the source to the end, with what made each from the one before."""
    first = story.stages[0]
    source = {"made": "source", "name": Path(first.config["model"]).name}
    models = [source | {key: first.facts.get(key) for key in ("shape", "parameters")}]
    for stage in story.stages:
        shape = stage.facts.get("target") or stage.facts.get("shape")
        count = stage.facts.get("target_parameters") or stage.facts.get("parameters")
        made = ("pruned" if stage.prunes else "trained") + f" on {short(stage.tokens)} tokens"
        models.append({"made": made, "name": stage.name, "shape": shape, "parameters": count})
    return models if first.facts else []


def _losses(story: Story) -> list[dict[str, Any]]:
    """Rows of the table of losses, each with what it has lost against the first."""
    rows = []
    base = story.source
    for name, losses in story.table():
        cells = [(losses.get(domain), _above(losses, base, domain)) for domain in story.domains]
        gap = mean(losses) - mean(base) if base and losses is not base else None
        rows.append({"name": name, "cells": cells, "mean": mean(losses), "gap": gap})
    for row in rows[len(rows) - len([b for b in story.baselines if b.held_out]) :] if story.baselines else []:
        row["baseline"] = True
    return rows


def _above(losses: dict[str, float], base: dict[str, float], domain: str) -> float | None:
    if losses is base or domain not in losses or domain not in base:
        return None
    return losses[domain] - base[domain]


def _facts(stage: Stage) -> list[tuple[str, str]]:
    """What ran, on what, how fast."""
    facts, last = stage.facts, stage.last
    found = [("folder", str(stage.folder)), ("model", str(stage.config["model"]))]
    if facts:
        layout = ", ".join(f"{axis} {facts['layout'][axis]}" for axis in ("pp", "replicate", "shard", "tp"))
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        ranks = "1 rank" if facts["ranks"] == 1 else f"{facts['ranks']} ranks ({layout})"
        found += [("ran on", f"{ranks} of {facts['device']}, {facts['compute']}"), ("software", versions)]
        if facts.get("commit"):
            found.append(("commit", facts["commit"]))
    batch = stage.config["train"]["batch"]
    found.append(("batch", f"{batch:,} sequences of {stage.config['data']['sequence']:,} tokens"))
    found.append(("learning rate", f"{stage.config['optimizer']['learning_rate']:g}"))
    speed = f"{median(line['tokens_per_second'] for line in stage.lines):,.0f} tokens per second"
    if "tflops_per_rank" in last:
        speed += f", {median(_known(stage, 'tflops_per_rank')):.3g} TFLOP/s per rank"
    found.append(("median step", speed))
    if "peak_memory" in last:
        found.append(
            ("peak memory", f"{memory(max(line.get('peak_memory', 0) for line in stage.lines))} on the main rank")
        )
    if stage.skipped:
        found.append(
            ("skipped", f"{stage.skipped} of {last['step']:,} steps, where something was not finite (metrics.jsonl)")
        )
    return found


def _known(stage: Stage, key: str) -> list[float]:
    return [line[key] for line in stage.lines if key in line]
