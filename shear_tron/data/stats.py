"""How much there is of each domain."""

from pathlib import Path

import numpy as np

from shear_tron.data.manifest import Manifest


def stats(folder: str, picture: str | None = None) -> str:
    """A table of tokens and documents by domain; with ``picture``, a PNG of token counts and document lengths too."""
    manifest = Manifest.read(folder)
    rows = [("domain", "tokens", "share", "documents", "median", "90 %", "held out", "empty", "damaged", "duplicates")]
    lengths = {name: _lengths(manifest, name) for name in manifest.domains}
    total = sum(domain.tokens() for domain in manifest.domains.values())
    for name, domain in manifest.domains.items():
        median, ninety = (f"{np.quantile(lengths[name], q):,.0f}" if len(lengths[name]) else "-" for q in (0.5, 0.9))
        rows.append(
            (
                name,
                f"{domain.tokens():,}",
                f"{domain.tokens() / max(total, 1):.1%}",
                f"{domain.documents():,}",
                median,
                ninety,
                f"{domain.tokens('held_out'):,}",
                f"{domain.empty:,}",
                f"{domain.damaged:,}",
                "-" if domain.duplicates is None else f"{domain.duplicates:,}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in rows)
    ]
    if picture:
        _draw(manifest, lengths, picture)
        lines.append(f"picture: {picture}")
    return "\n".join(lines)


def _lengths(manifest: Manifest, name: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Tokens of each training document, from the shards' indexes."""
    lengths = [np.empty(0, np.int64)]
    for shard in manifest.domains[name].train:
        file = Path(manifest.folder) / f"{shard.file}.index"
        lengths.append(np.diff(np.fromfile(file, dtype="<i8"), prepend=0))
        if (lengths[-1] < 0).any():
            raise ValueError(f"{file} is damaged; run `shear-tron prepare` again")
    return np.concatenate(lengths)


def _draw(manifest: Manifest, lengths: dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]], picture: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib; pip install 'shear-tron[plots]'") from None

    figure = Figure(figsize=(10, 0.5 * len(lengths) + 2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(lengths)[::-1]
    left.barh(names, [manifest.domains[name].tokens() for name in names], color="#4477aa", label="train")
    left.barh(
        names,
        [manifest.domains[name].tokens("held_out") for name in names],
        left=[manifest.domains[name].tokens() for name in names],
        color="#ee6677",
        label="held out",
    )
    left.set_xlabel("tokens")
    left.legend()
    right.boxplot(
        [lengths[name] for name in names], orientation="horizontal", tick_labels=names, whis=(5, 95), showfliers=False
    )
    right.set_xscale(_scale(list(lengths.values())))
    right.set_xlabel("tokens per document\nbox: middle half, whiskers: 5 to 95 %")
    figure.savefig(picture, dpi=120)


def _scale(lengths: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> str:
    """Logarithmic for lengths over decades; over less than one its labels would collide."""
    ends = [np.percentile(each, (5, 95)) for each in lengths if len(each)]
    return "log" if ends and np.max(ends) > 10 * np.min(ends) else "linear"
