"""An index of ten million samples opens in seconds and little memory. Slow: it writes a file of 2 GB."""

import pytest

from moss_train.bench.data_loading.ten_million import SAMPLES, open_ten_million


def test_many_samples_open_at_once(tmp_path):
    opened = open_ten_million(tmp_path / "index", print, 40_000)
    assert opened.samples == 40_000 and opened.modalities == [0, 0, 40_000]
    assert opened.seconds < 2 and opened.resident_gb < 1


@pytest.mark.slow
def test_ten_million_samples_open_in_seconds_and_little_memory(tmp_path):
    opened = open_ten_million(tmp_path / "index", print)
    assert opened.samples == SAMPLES and opened.modalities == [0, 0, SAMPLES]
    assert opened.seconds < 5 and opened.resident_gb < 2
    # Pages of the file that were looked into are resident too, until the system needs them; memory of its own is not.
    assert opened.own_used_gb < 1
