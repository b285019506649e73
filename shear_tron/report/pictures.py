"""Figures for papers: every one of a story as PNG and SVG, on white, as wide as a column."""

from pathlib import Path

import altair as alt
import vl_convert

from shear_tron.report import gates, theme
from shear_tron.report.figures import Figure, figures
from shear_tron.report.story import Story

WIDTH, PANEL = 340, 176  # pixels, of which a PNG has three each


def pictures(story: Story, folder: Path) -> list[Path]:
    """Write the figures; ``overview`` shows losses, mixture and sparsities together. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Figure] = {name: chart.properties(width=WIDTH) for name, chart in figures(story).items()}
    panels = [drawn.pop(name).properties(width=PANEL) for name in list(drawn) if name.startswith("sparsity-")]
    wide = [drawn[name] for name in ("loss", "excess", "mixture") if name in drawn]
    rows = [alt.hconcat(*wide, spacing=28).resolve_scale(color="independent", shape="independent")]
    if story.pruning and panels:
        drawn["sparsity"] = alt.concat(*panels, columns=3)
        rows.append(alt.hconcat(*panels, spacing=24))
    if story.pruning and story.pruning.gates:
        drawn["gates"] = gates.panorama(story.pruning)
    drawn["overview"] = alt.vconcat(*rows, spacing=28)
    written = []
    for name, chart in drawn.items():
        spec = {**chart.to_dict(), "config": {**theme.config(theme.LIGHT), "background": "white"}}
        (folder / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(spec))
        (folder / f"{name}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=3))
        written += [folder / f"{name}.svg", folder / f"{name}.png"]
    return written
