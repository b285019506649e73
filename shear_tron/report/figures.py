"""The figures of a story, each an Altair chart: what the page shows and what ``--png`` writes.

Widths and colours are left to who draws them: the page fits figures to their column and to light or dark
(``theme``), a picture for a paper has a fixed width.
"""

from typing import Any, TypeAlias

import altair as alt

from shear_tron.report.story import Losses, Miss, Stage, Story, mean
from shear_tron.report.units import SPARSITIES

alt.data_transformers.disable_max_rows()

HEIGHT = 240
SMALL = 130
MANY = 40  # evaluations: that many marks on a line hide it
BILLIONS = "datum.value ? replace(format(datum.value, '~s'), 'G', 'B') : '0'"  # axis labels: 20k, 5B
DASHES = [[1, 0], [6, 3], [2, 2], [9, 3, 2, 3], [4, 1]]
STEP = alt.X("step:Q", title="pruning step", scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1))
Figure: TypeAlias = Any  # an Altair chart of any sort
Rows = list[dict[str, Any]]


def figures(story: Story) -> dict[str, Figure]:
    """Charts by name, those that the runs recorded enough for."""
    drawn = {"loss": _loss(story), "mixture": _mixture(story), "excess": _excess(story), "speed": _speed(story)}
    if story.pruning:
        drawn |= {f"sparsity-{kind}": chart for kind, chart in _sparsities(story.pruning).items()}
        drawn |= {"time": _time(story.pruning), **_multipliers(story.pruning)}
    return {name: chart for name, chart in drawn.items() if chart is not None}


def _x(story: Story, marked: bool = False) -> alt.X:
    """marked: room at both ends for marks on a line."""
    scale = alt.Scale(domain=[0, story.stages[-1].last["tokens"]], nice=False, padding=6 if marked else 0)
    return alt.X("tokens:Q", title="tokens seen", axis=alt.Axis(labelExpr=BILLIONS), scale=scale)


def chart(rows: Rows) -> Figure:
    """Over ``rows``, whose numbers are cut to more digits than a figure shows."""
    short = [{key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    return alt.Chart(alt.InlineData(values=short))


def _points(story: Story) -> alt.OverlayMarkDef | bool:
    evaluations = sum(len(stage.evaluations) for stage in story.stages)
    return alt.OverlayMarkDef(filled=True, size=45) if evaluations <= MANY else False


def _boundaries(story: Story) -> Figure | None:
    """A line where one run ends and the next begins."""
    rows = [{"tokens": stage.start, "label": stage.name} for stage in story.stages[1:]]
    if not rows:
        return None
    rule = chart(rows).mark_rule(style="faint", strokeDash=[2, 3]).encode(x="tokens:Q")
    text = chart(rows).mark_text(style="faint", align="center", baseline="bottom", y=0, dy=-3)
    return alt.layer(rule, text.encode(x="tokens:Q", text="label:N"))


def _layer(story: Story, *charts: alt.Chart) -> Figure:
    boundaries = _boundaries(story)
    return alt.layer(*charts, *([boundaries] if boundaries else [])).properties(height=HEIGHT)


def _loss(story: Story) -> Figure:
    training: Rows = []
    evaluated: Rows = []
    for stage in story.stages:
        for line in stage.lines:
            at = {"tokens": line["tokens"], "step": line["step"], "run": stage.name}
            training.append({**at, "loss": line["loss"], "what": "training batch"})
        evaluated += [_mean(stage, "held out, mean", *each) for each in stage.evaluations]
    for stage in story.baselines:
        shown = [each for each in stage.evaluations if each[1] <= story.stages[-1].last["tokens"]]
        evaluated += [_mean(stage, stage.name, *each) for each in shown]
    named = ["training batch", "held out, mean", *(stage.name for stage in story.baselines)]
    y = alt.Y("loss:Q", title="loss, nats per token", scale=alt.Scale(zero=False))
    kind = alt.Color("what:N", title=None, scale=alt.Scale(domain=named))
    tooltip = ["run:N", "step:Q", "tokens:Q", alt.Tooltip("loss:Q", format=".3f")]
    lines = [
        chart(training)
        .mark_line(strokeWidth=1, opacity=0.55)
        .encode(x=_x(story, True), y=y, color=kind, detail="run:N"),
        chart(evaluated).mark_line(point=_points(story)).encode(x=_x(story, True), y=y, color=kind, tooltip=tooltip),
    ]
    if story.source:
        label = "source, held out" if story.source_is_measured else "reference, mean"
        rows = [{"loss": mean(story.source), "label": label}]
        lines.append(chart(rows).mark_rule(style="wanted", strokeDash=[5, 3]).encode(y="loss:Q"))
        place = {"style": "wanted", "align": "right", "baseline": "bottom", "dy": -3, "x": "width"}
        lines.append(chart(rows).mark_text(**place).encode(y="loss:Q", text="label:N"))
    return _layer(story, *lines)


def _mean(stage: Stage, what: str, step: int, tokens: int, losses: Losses) -> dict[str, Any]:
    return {"tokens": tokens, "step": step, "run": stage.name, "loss": mean(losses), "what": what}


def _mixture(story: Story) -> Figure:
    rows: Rows = []
    for stage in story.stages:
        for before, line in zip([{}, *stage.lines], stage.lines, strict=False):
            if line["weights"] != before.get("weights") or line is stage.last:  # it stays as it is between updates
                tokens = line["tokens"] if before or stage.start else 0
                weights = line["weights"].items()
                rows += [{"tokens": tokens, "domain": name, "weight": weight} for name, weight in weights]
    y = alt.Y("weight:Q", stack="normalize", title="share of a batch", axis=alt.Axis(format="%"))
    area = chart(rows).mark_area(interpolate="step-after", opacity=0.85)
    return _layer(
        story, area.encode(x=_x(story), y=y, color=_domain(story), tooltip=["domain:N", "weight:Q", "tokens:Q"])
    )


def _excess(story: Story) -> Figure | None:
    rows = [
        {"tokens": tokens, "domain": name, "run": stage.name, "excess": loss - stage.references[name]}
        for stage in story.stages
        for _, tokens, losses in stage.evaluations
        for name, loss in losses.items()
        if name in stage.references
    ]
    if not rows:
        return None
    zero = chart([{"excess": 0}]).mark_rule(style="wanted", strokeDash=[5, 3]).encode(y="excess:Q")
    line = chart(rows).mark_line(point=_points(story))
    y = alt.Y("excess:Q", title="held-out loss above reference, nats")
    tooltip = ["domain:N", "run:N", "tokens:Q", alt.Tooltip("excess:Q", format="+.3f")]
    line = line.encode(x=_x(story, True), y=y, color=_domain(story), tooltip=tooltip, detail="run:N")
    if _points(story):
        line = line.encode(
            shape=alt.Shape("domain:N", title=None, sort=story.domains, scale=alt.Scale(domain=story.domains))
        )
    return _layer(story, zero, line)


def _domain(story: Story) -> alt.Color:
    return alt.Color("domain:N", title=None, sort=story.domains, scale=alt.Scale(domain=story.domains))


def _sparsities(stage: Stage) -> dict[str, Figure]:
    """A panel a kind: sparsity expected against wanted, its end marked, with the size of a miss."""
    ends = stage.misses
    top = 1.06 * max(
        line[f"{which}_{end.key}"] for line in stage.lines for end in ends for which in ("expected", "target")
    )
    y = alt.Y("sparsity:Q", title=None, axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, top]))
    tooltip = ["step:Q", alt.Tooltip("sparsity:Q", format=".1%")]
    panels = {}
    for end in ends:
        expected, wanted = (
            [{"step": line["step"], "sparsity": line[f"{which}_{end.key}"]} for line in stage.lines]
            for which in ("expected", "target")
        )
        missed = end.missed and stage.finished
        mark: dict[str, Any] = {"shape": "cross", "angle": 45, "size": 170, "style": "miss"}
        if not missed:
            mark = {"shape": "circle", "size": 70, "style": "reached"}
        panels[end.kind] = alt.layer(
            chart(wanted).mark_line(style="wanted", strokeDash=[2, 3], strokeWidth=1.5).encode(x=STEP, y=y),
            chart(expected).mark_line().encode(x=STEP, y=y, tooltip=tooltip),
            chart([expected[-1]]).mark_point(filled=True, opacity=1, **mark).encode(x=STEP, y=y),
        ).properties(
            height=SMALL,
            title=alt.TitleParams(SPARSITIES[end.kind], subtitle=verdict(end, stage.finished).split(": ")),
        )
    return panels


def verdict(end: Miss, finished: bool) -> str:
    """How near a kind came, in words."""
    words = f"{end.expected:.1%} closed, {end.target:.1%} wanted"
    missed = f"missed by {100 * abs(end.expected - end.target):.1f} points: "
    return (missed if finished and end.missed else "") + words


def _multipliers(stage: Stage) -> dict[str, Figure]:
    drawn = {}
    for place, name in enumerate(("linear", "quadratic")):
        rows = [
            {"step": line["step"], "kind": SPARSITIES[kind], "value": pair[place]}
            for line in stage.lines
            for kind, pair in line.get("multipliers", {}).items()
        ]
        if rows:
            drawn[f"multiplier-{name}"] = (
                chart(rows)
                .mark_line()
                .encode(
                    x=STEP,
                    y=alt.Y("value:Q", title=f"{name} multiplier"),
                    color=_kind(stage),
                    strokeDash=alt.StrokeDash(
                        "kind:N", title=None, sort=_kinds(stage), scale=alt.Scale(domain=_kinds(stage), range=DASHES)
                    ),
                )
                .properties(height=HEIGHT)
            )
    return drawn


def _kinds(stage: Stage) -> list[str]:
    return [SPARSITIES[kind] for kind in stage.last.get("multipliers", {})]


def _kind(stage: Stage) -> alt.Color:
    return alt.Color("kind:N", title=None, sort=_kinds(stage), scale=alt.Scale(domain=_kinds(stage)))


def _speed(story: Story) -> Figure:
    rows = [
        {"tokens": line["tokens"], "speed": line["tokens_per_second"], "run": stage.name}
        for stage in story.stages
        for line in stage.lines
    ]
    y = alt.Y(
        "speed:Q", title="tokens per second, all ranks", axis=alt.Axis(labelExpr=BILLIONS), scale=alt.Scale(zero=True)
    )
    return _layer(story, chart(rows).mark_line().encode(x=_x(story), y=y, detail="run:N"))


def _time(stage: Stage) -> Figure | None:
    names = {"seconds_to_dense": "time", "flops_to_dense": "operations"}
    rows = [
        {"step": line["step"], "share": line[key], "what": name}
        for line in stage.lines
        for key, name in names.items()
        if key in line
    ]
    if not rows:
        return None
    y = alt.Y("share:Q", title="of a dense step", axis=alt.Axis(format="%"), scale=alt.Scale(zero=True))
    colour = alt.Color("what:N", title=None, sort=list(names.values()))
    return chart(rows).mark_line().encode(x=STEP, y=y, color=colour).properties(height=HEIGHT)
