"""How figures look, on light paper and on a dark screen.

Colours are Okabe and Ito's, which people with any colour vision tell apart; on dark ground they are lightened. Gates
are shown from the ground's own colour (closed) to blue (open), so that what was pruned fades away.
"""

from typing import Any

LIGHT = {
    "ink": "#1b1f24", "faint": "#59636e", "grid": "#e4e7eb", "ground": "#ffffff", "miss": "#b3261e",
    "category": ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#6f6f6f", "#8c6d1f"],
    "ramp": ["#f1f2f4", "#a9cde6", "#4f9bcb", "#0b5a93", "#06304f"],
}  # fmt: skip
DARK = {
    "ink": "#e8eaed", "faint": "#a4acb6", "grid": "#2d333b", "ground": "#171b21", "miss": "#ff8a80",
    "category": ["#4ea6dc", "#f0b83c", "#2fc79b", "#e09cc3", "#9ad5f5", "#f08a4b", "#b0b0b0", "#cfae5c"],
    "ramp": ["#20262e", "#1f4a6b", "#2d7cb3", "#6fbbe8", "#dbf0fc"],
}  # fmt: skip

FONT = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def config(colours: dict[str, Any]) -> dict[str, Any]:
    """Vega-Lite's config for one set of colours."""
    ink, faint, grid = colours["ink"], colours["faint"], colours["grid"]
    return {
        "background": None,
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            "labelColor": faint, "titleColor": faint, "domainColor": grid, "tickColor": grid, "gridColor": grid,
            "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "titlePadding": 6,
            "labelOverlap": True, "labelSeparation": 3, "tickSize": 4,
        },
        "axisX": {"grid": False, "tickCount": 5},
        "axisY": {"domain": False, "ticks": False, "tickCount": 5},
        "legend": {
            "labelColor": ink, "titleColor": faint, "titleFontWeight": "normal", "titleFontSize": 11,
            "labelFontSize": 11, "orient": "bottom", "columns": 3, "symbolStrokeWidth": 2.5, "symbolSize": 70,
            "labelLimit": 170, "symbolOpacity": 1, "offset": 8, "columnPadding": 14,
        },
        "title": {
            "color": ink, "subtitleColor": faint, "anchor": "start", "fontSize": 12, "fontWeight": 600,
            "subtitleFontSize": 11, "offset": 8,
        },
        "header": {"labelColor": faint, "titleColor": faint, "labelFontSize": 11},
        "range": {"category": colours["category"], "heatmap": colours["ramp"], "ramp": colours["ramp"]},
        "line": {"strokeWidth": 2},
        "text": {"fontSize": 11},
        "mark": {"color": colours["category"][0]},
        "style": {
            "faint": {"color": faint}, "wanted": {"color": ink}, "reached": {"color": colours["category"][0]},
            "miss": {"color": colours["miss"]},
        },
    }  # fmt: skip
