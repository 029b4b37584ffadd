import json
import time

import cv2
import pytest

from benchmarks.mini_world import main, rate
from benchmarks.record import processor


@pytest.fixture
def opencv_threads():
    threads = cv2.getNumThreads()
    yield
    cv2.setNumThreads(threads)


def test_a_rate_counts_what_is_drawn_and_tells_waiting_from_work():
    drawn = []

    def draw(index):
        drawn.append(index)
        time.sleep(0.02)

    found = rate(draw, 5, first=7)
    assert drawn == [7, 8, 9, 10, 11]
    assert found["wall_per_s"] <= 50 < found["cpu_per_s"]


def test_the_command_writes_a_rate_for_each_kind_of_scene(tmp_path, opencv_threads, monkeypatch):
    drawn = []
    for kind in ("street", "objects"):
        monkeypatch.setattr(
            f"benchmarks.mini_world.render_{kind}", lambda *args, **kwargs: drawn.append(args)
        )
    # A clock of 10 ms a reading, so that drawing nothing takes time.
    for clock in ("perf_counter", "process_time"):
        readings = iter(range(100))
        monkeypatch.setattr(
            f"benchmarks.mini_world.time.{clock}", lambda readings=readings: next(readings) / 100
        )
    main(["--count", "3", "--output", str(tmp_path / "new" / "result.json")])
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert result["scenes"] == 3 and len(drawn) == 6 * (20 + 3)  # 20 fill the noise bank
    rates = [value for value in result.values() if isinstance(value, dict)]
    assert rates == [{"wall_per_s": 300.0, "cpu_per_s": 300.0}] * 6


def test_the_result_names_commit_processor_and_what_each_kind_draws(tmp_path, opencv_threads, monkeypatch):
    drawn = []
    for kind in ("street", "objects"):
        monkeypatch.setattr(
            f"benchmarks.mini_world.render_{kind}",
            lambda split, index, kind=kind, **options: drawn.append((kind, str(options))),
        )
    monkeypatch.setattr("benchmarks.mini_world.rate", lambda draw, count, first: draw(first))
    monkeypatch.setattr("benchmarks.record.git_state", lambda folder: {"commit": "abc", "dirty": False})
    main(["--output", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["commit"] == "abc" and not result["dirty"]
    assert result["processor"] == processor() and len(processor()) > 2
    assert len(set(drawn)) == 6
    assert ("street", "{'style': 'game'}") in drawn
    assert all((kind, "{'size': 256}") in drawn for kind in ("street", "objects"))


def test_a_count_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--count", "0"])
    assert "at least 1" in capsys.readouterr().err
