"""Rows of measurements: numbers, and by which commit, on what machine and when they were taken."""

import csv
import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def append(file: Path, row: dict[str, Any]) -> None:
    """Add ``row`` to a CSV file, and say it."""
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=file.parent).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    when = {"commit": commit, "date": datetime.date.today().isoformat()}
    row = {"device": device, **row, "torch": torch.__version__, "python": platform.python_version(), **when}
    header = not file.exists()
    with file.open("a") as opened:
        writer = csv.DictWriter(opened, row, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerow(row)
    print("\n".join(f"{key:20} {value}" for key, value in row.items()))
