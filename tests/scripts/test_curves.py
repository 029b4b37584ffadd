import re
import sys

import pytest
from PIL import Image

from config_files import UsageError
from scripts.curves import PANELS, main, read_metrics

HEADER = "step,lr-AdamW,train/loss,val/day/IoU/road,val/day/mIoU,val/mIoU,val/night/mIoU\n"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = ["9,0.001,2.5,,,,", "19,0.002,1.5,,,,", "19,,,90,50.0,40.0,30.0", "29,0.001,1.0,80,60.0,50.0,40.0"]
    (folder / "metrics.csv").write_text(HEADER + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def plotted(monkeypatch):
    """What is drawn: {label: (steps, values)}."""
    from matplotlib.axes import Axes

    curves, plot = {}, Axes.plot

    def record(axes, *args, label, **style):
        curves[label] = args
        return plot(axes, *args, label=label, **style)

    monkeypatch.setattr(Axes, "plot", record)
    return curves


def test_a_column_leaves_out_the_rows_without_its_value(run):
    metrics = read_metrics(run)
    assert metrics["train/loss"] == ((9, 19, 29), (2.5, 1.5, 1.0))
    assert metrics["val/mIoU"] == ((19, 29), (40.0, 50.0))


def test_one_run_shows_loss_rate_mean_and_each_set_in_its_folder(run, plotted, capsys):
    main([str(run)])
    assert set(plotted) == {"train/loss", "lr-AdamW", "mean", "day", "night"}
    assert plotted["night"] == ((19, 29), (30.0, 40.0))
    path = run / "pictures" / "curves.png"
    assert str(path) in capsys.readouterr().out and min(Image.open(path).size) > 400


def test_several_runs_show_their_means_in_the_file_that_is_asked_for(run, tmp_path, plotted):
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.csv").write_text("step,train/loss,val/mIoU\n9,3.0,10\n")
    main([str(run), str(other), "--output", str(tmp_path / "new" / "both.png")])
    assert {label for label in plotted if "mean" in label} == {f"{run}: mean", f"{other}: mean"}
    assert not any("night" in label for label in plotted)
    assert (tmp_path / "new" / "both.png").is_file() and not (run / "pictures").exists()


def test_each_kind_of_loss_is_shown_and_the_iou_of_a_class_is_not():
    def shown(name):
        return [title for title, pattern in PANELS.items() if re.fullmatch(pattern, name)]

    assert shown("train/loss_mixed") == ["training loss"] and shown("lr-AdamW/unet") == ["learning rate"]
    assert shown("val/day/IoU/road") == [] and shown("train/images_per_s") == []


def test_several_runs_without_output_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        main([str(run), str(run)])
    assert "--output FILE" in capsys.readouterr().err


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"metrics\.csv is missing: give folders"):
        main([str(tmp_path)])


def test_metrics_without_a_row_are_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text(HEADER)
    with pytest.raises(UsageError, match="has no rows"):
        main([str(tmp_path)])


def test_a_missing_matplotlib_is_said_with_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=re.escape('pip install -e ".[demo]"')):
        main([str(run)])
