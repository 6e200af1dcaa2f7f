"""Films: the time of their frames, segments and settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from factory.sources import describe_source
from factory.video import Segment, VideoConfig
from tests.footage import candidates, patterns, write_film


def test_time_comes_from_the_stream_when_the_frame_rate_varies(tmp_path: Path) -> None:
    frames = patterns(3, 12)
    steps = [40] * 12 + [200] * 12 + [20] * 12
    times = [500 + sum(steps[:i]) for i in range(36)]
    path = write_film(tmp_path / "vfr.mkv", frames, times=times)
    rows = candidates(path)
    assert [row["shot_start"] for row in rows] == pytest.approx([0.0, 0.48, 2.88], abs=0.002)
    for row in rows:
        assert row["timestamp"] == pytest.approx((times[row["frame_index"]] - 500) / 1000, abs=0.002)
        assert row["frame_id"].endswith(f"-{round(row['timestamp'] * 1e6):012d}")
    assert describe_source(str(path), VideoConfig())["start_time"] == pytest.approx(0.5)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="jpeg_quality"):
        VideoConfig(jpeg_quality=0)
    segment = Segment(source_id="0" * 64, uri="x", start=0, end=1.5, modified_ns=0)
    assert segment.segment_id == "0000000000000000@0-1500000"
    assert replace(segment, start=1.0).segment_id != segment.segment_id
