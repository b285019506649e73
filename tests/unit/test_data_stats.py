"""The picture of prepared domains is legible."""

import numpy as np

from shear_tron.data.stats import _scale


def test_an_axis_is_logarithmic_where_lengths_span_decades() -> None:
    alike, short, none = np.arange(100, 120), np.arange(1, 9), np.empty(0, np.int64)
    assert _scale([alike, none]) == _scale([none]) == "linear"
    assert _scale([alike, short]) == "log"
