"""The table of prepared domains is true, or refused; their picture is legible."""

from pathlib import Path

import numpy as np
import pytest
from inputs import write_data_in

from shear_tron.data.stats import _scale, stats


def test_documents_that_end_before_they_begin_are_refused(tmp_path: Path) -> None:
    write_data_in(tmp_path / "data")
    np.array([64, 20], dtype="<u8").tofile(tmp_path / "data" / "train.ds.index")
    with pytest.raises(ValueError, match=r"train.ds.index is damaged; run `shear-tron prepare`"):
        stats(str(tmp_path / "data"))


def test_an_axis_is_logarithmic_where_lengths_span_decades() -> None:
    alike, short, none = np.arange(100, 120), np.arange(1, 9), np.empty(0, np.int64)
    assert _scale([alike, none]) == _scale([none]) == "linear"
    assert _scale([alike, short]) == "log"
