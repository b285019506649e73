"""Gates as they close: each unit's chance to act, over layers and heads, and over layers and blocks of ffn columns.

A unit acts where its own gate and its layer's are open; a query head, where its key-value head's is too. Gates are
independent, so chances multiply.
"""

from typing import Any

import altair as alt

from shear_tron.report.figures import Figure, chart
from shear_tron.report.story import Stage

MAPS = {
    "layers": "layers",
    "heads": "layers x query heads",
    "ffn": "layers x blocks of ffn columns",
    "hidden": "blocks of hidden dimensions",
}
MOMENTS = 4  # in a picture


def frames(stage: Stage) -> list[dict[str, Any]]:
    """A frame a snapshot: ``step``, ``tokens`` and, for each map whose kinds are pruned, chances as nested lists."""
    return [_frame(snapshot, stage.facts["shape"]) for snapshot in stage.gates]


def _frame(snapshot: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    layers = snapshot.get("layers", [1.0] * shape["layers"])
    frame: dict[str, Any] = {key: snapshot[key] for key in ("step", "tokens", "layers", "hidden") if key in snapshot}
    if "kv_heads" in snapshot or "heads_per_group" in snapshot:
        groups, each = shape["kv_heads"], shape["heads"] // shape["kv_heads"]
        kv_heads = snapshot.get("kv_heads", [[1.0] * groups] * len(layers))
        in_group = snapshot.get("heads_per_group", [[1.0] * each] * len(layers))
        frame["heads"] = [
            [round(layer * group * head, 3) for group in kv_heads[number] for head in in_group[number]]
            for number, layer in enumerate(layers)
        ]
    if "ffn" in snapshot:
        frame["ffn"] = [
            [round(layer * block, 3) for block in row] for layer, row in zip(layers, snapshot["ffn"], strict=True)
        ]
    return frame


def cells(name: str, values: list[Any]) -> list[dict[str, Any]]:
    """Rows {layer, unit, open} of one map, as its chart reads them."""
    if name == "layers":
        return [{"layer": layer, "unit": 0, "open": chance} for layer, chance in enumerate(values)]
    rows = [values] if name == "hidden" else values
    return [
        {"layer": layer, "unit": unit, "open": chance}
        for layer, row in enumerate(rows)
        for unit, chance in enumerate(row)
    ]


def maps(stage: Stage) -> dict[str, Figure]:
    """A chart for each map, over data named ``cells`` that the page fills in with the frame it shows."""
    if not stage.gates:
        return {}
    last = frames(stage)[-1]
    tall = max(150, min(420, 11 * stage.facts["shape"]["layers"]))
    return {
        name: _map(alt.Chart(alt.NamedData(name="cells")), name).properties(height=34 if name == "hidden" else tall)
        for name in MAPS
        if name in last
    }


def panorama(stage: Stage) -> Figure | None:
    """The maps at a few moments side by side, for paper."""
    found = frames(stage)
    if not found:
        return None
    moments = sorted({round(place * (len(found) - 1) / (MOMENTS - 1)) for place in range(MOMENTS)})
    rows = [
        alt.hconcat(*(_still(name, found[moment], first=moment == moments[0]) for moment in moments), spacing=14)
        for name in MAPS
        if name in found[-1]
    ]
    return alt.vconcat(*rows, spacing=18)


def _still(name: str, frame: dict[str, Any], first: bool) -> Figure:
    title = alt.TitleParams(f"step {frame['step']:,}", fontWeight="normal")
    still = _map(chart(cells(name, frame[name])), name, legend=True, y_title=first)
    return still.properties(width=192, height=24 if name == "hidden" else 140, title=title)


def _map(over: Figure, name: str, legend: bool = False, y_title: bool = True) -> Figure:
    color = alt.Color(
        "open:Q",
        scale=alt.Scale(domain=[0, 1]),
        legend=alt.Legend(title="chance to be open", format="%", gradientLength=140, orient="top") if legend else None,
    )
    layer = alt.Y("layer:O", title="layer" if y_title else None)
    tooltip = ["layer:O", alt.Tooltip("open:Q", format=".1%")]
    if name == "layers":
        x = alt.X(
            "open:Q",
            title="chance to be open",
            scale=alt.Scale(domain=[0, 1]),
            axis=alt.Axis(format="%", values=[0, 0.5, 1]),
        )
        return over.mark_bar().encode(x=x, y=layer, color=color, tooltip=tooltip)
    titles = {"heads": "query head", "ffn": "block of ffn columns", "hidden": "block of hidden dimensions"}
    x = alt.X("unit:O", title=titles[name], axis=alt.Axis(labelAngle=0, ticks=False))
    rows = over.mark_rect().encode(x=x, color=color, tooltip=[*tooltip, "unit:O"])
    return rows if name == "hidden" else rows.encode(y=layer)
