import csv
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import compare
from callbacks.pictures import comparison
from comparison_page import panels, ticks
from functional.classes import class_table
from functional.palette import colorize
from tests.tiny_run import tiny_config, write_config

ROOT = Path(__file__).parent.parent
TABLE = class_table("deliver11")
SIZE = 24


def scores(value: float, classes=("sky", "road")) -> dict:
    ious = {name: value + i for i, name in enumerate(classes)}
    return {"step": 20, "mean": {"mIoU": value}, "sets": {"day": {"mIoU": value, "IoU": ious}}}


def fake_run(folder: Path, seed: int, lr: float = 0.1, value: float = 40.0, **change) -> Path:
    """A run of 20 steps whose validation score falls in its second half, tested on 3 images."""
    (folder / "test/own-last/pictures").mkdir(parents=True)
    init = {"lr": lr, "classes": "deliver11", "seed": seed, **change.pop("model", {})}
    config = {"seed_everything": seed, "model": {"init_args": init}, "wandb": {"name": folder.name}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    record = {
        "seed": seed,
        "status": "finished",
        "step": 20,
        "started": "2026-01-01T10:00:00+00:00",
        "ended": "2026-01-01T10:01:05+00:00",
        "git": {"commit": "0123456789ab", "dirty": True},
    }
    (folder / "run.json").write_text(json.dumps(record | change))
    (folder / "metrics.json").write_text(json.dumps({"val": scores(value)}))
    rows = ["step,train/loss,val/day/mIoU,val/mIoU", f"10,2.0,{value + 5},{value + 5}", "15,1.5,,"]
    (folder / "metrics.csv").write_text("\n".join([*rows, f"20,1.0,{value},{value}"]) + "\n")
    test = folder / "test/own-last"
    (test / "metrics.json").write_text(json.dumps({"test": scores(value + 1)}))
    images = {"a b": value - 10, "easy": value + 40, "undrawn": 1.0}
    with (test / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["set", "name", "mIoU"], *(["day", *row] for row in images.items())])
    for name in ("a_b", "easy"):
        Image.fromarray(drawing(seed)).save(test / f"pictures/day-{name}.png")
    return folder


@cache
def drawing(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    truth, prediction = rng.integers(0, 11, (2, SIZE, SIZE), np.uint8)
    return comparison(image, truth, prediction, TABLE.names, TABLE.colors)


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two experiments of two seeds, which differ in lr."""
    folders = [fake_run(tmp_path / f"runs/low-{seed}", seed, 0.1, 40 + 2 * seed) for seed in (0, 1)]
    return folders + [fake_run(tmp_path / f"runs/high-{seed}", seed, 0.2, 60) for seed in (0, 1)]


def page_of(folders, tmp_path, *options) -> str:
    output = tmp_path / "out/page.html"
    compare.main([*map(str, folders), "--output", str(output), *options])
    return output.read_text("utf-8")


def rows(page: str) -> dict[str, list[str]]:
    """Cells of table rows as text, by the first; those of one name in several tables follow each other."""
    found = {}
    for row in re.findall(r"<tr.*?</tr>", page, re.S):
        cells = [re.sub("<.*?>", "", cell).strip() for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.S)]
        found.setdefault(cells[0], []).extend(cells[1:])
    return found


def error_of(args, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        compare.main([str(arg) for arg in args])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_seeds_of_one_config_are_one_row_with_mean_and_deviation(runs, tmp_path):
    found = rows(page_of(runs, tmp_path))
    # best 45 and 47, last 40 and 42, test 41 and 43: the sample deviation of two values 2 apart is sqrt(2)
    assert found["low n = 2"][:3] == ["46.00 ± 1.41", "10", "41.00 ± 1.41"]
    assert found["low n = 2"][3:7] == ["0, 1", "finished", "20", "0:01:05"]
    assert found["low n = 2"][7:] == ["01234567*", "42.00 ± 1.41"]
    assert found["low-1"][:3] == ["47.00", "10", "42.00"] and found["low-1"][-1] == "43.00"
    assert found["high n = 2"][0] == "65.00 ± 0.00"


def test_options_that_change_no_bit_of_a_training_keep_seeds_together(tmp_path):
    books = {"wandb": {"mode": "offline"}, "checkpoints": {"every_n_steps": 5}, "data": {"num_workers": 2}}
    runs = [fake_run(tmp_path / f"runs/a-{seed}", seed) for seed in (0, 1)]
    for config, change in ((runs[1] / "config.yaml", books), (runs[0] / "config.yaml", {"checkpoints": {}})):
        kept = yaml.safe_load(config.read_text()) | {"data": {}} | change
        config.write_text(yaml.safe_dump(kept))
    assert "a n = 2" in rows(page_of(runs, tmp_path))
    kept["checkpoints"]["monitor"] = "val/mAcc"  # chooses another best.ckpt
    config.write_text(yaml.safe_dump(kept))
    assert "a n = 2" not in rows(page_of(runs, tmp_path))


def test_the_step_of_a_run_that_was_killed_is_the_last_it_has_logged(tmp_path):
    run = fake_run(tmp_path / "killed", 0, status="running", step=0)
    assert rows(page_of([run], tmp_path))["killed"][4:6] == ["running", "20"]


def test_another_score_can_be_compared(runs, tmp_path, capsys):
    path = runs[0] / "metrics.csv"
    path.write_text(path.read_text().replace("mIoU", "FB-IoU"))
    found = rows(page_of(runs[:1], tmp_path, "--score", "FB-IoU"))
    assert found["low-0"][:2] == ["45.00", "10"]
    error = error_of([runs[0], "--score", "mAcc"], capsys)
    assert "'mAcc'" in error and "FB-IoU, mIoU" in error and len(error.splitlines()) == 3


def test_scores_of_sets_are_averaged_where_their_mean_is_not_logged(runs, tmp_path):
    path = runs[0] / "metrics.csv"
    path.write_text("step,val/day/mIoU,val/night/mIoU\n10,10,20\n")
    assert rows(page_of(runs[:1], tmp_path))["low-0"][:2] == ["15.00", "10"]


def test_curves_have_a_thin_line_for_each_run_and_a_thick_one_for_their_mean(runs, tmp_path):
    page = page_of(runs, tmp_path)
    assert re.findall('aria-label="(.*?)"', page)[:2] == ["validation mIoU (%)", "training loss"]
    chart = page[page.index('aria-label="validation') :].split("</svg>")[0]
    assert chart.count('stroke-opacity="0.5"') == 4 and chart.count('stroke-width="2.6"') == 2
    assert "optimiser step" in chart and ">mIoU (%)<" in chart and ">40<" in chart and ">20<" in chart


def test_ticks_are_round_and_surround_the_values():
    assert ticks(0, 400) == [0, 100, 200, 300, 400]
    found = ticks(17.6, 29.1)
    assert found[0] <= 17.6 and found[-1] >= 29.1 and all(value % 2.5 == 0 for value in found)
    assert len(ticks(3, 3)) >= 2


def test_classes_have_bars_with_mean_and_deviation(runs, tmp_path):
    page = page_of(runs, tmp_path)
    bars = page[page.index('aria-label="IoU by class"') :].split("</svg>")[0]
    assert bars.count("<rect") == 4 and ">sky<" in bars and ">road<" in bars
    assert ">42.0 ± 1.4<" in bars and ">43.0 ± 1.4<" in bars  # sky and road of the low ones
    assert "Classes, test own-last" in page


def test_each_pair_of_experiments_has_a_table_of_the_options_that_differ(runs, tmp_path):
    third = fake_run(tmp_path / "runs/third", 0, 0.1, model={"extra": "x < y"})
    page = page_of([*runs, third], tmp_path)
    tables = dict(re.findall(r'data-pair="(.*?)">(.*?)</table>', page, re.S))
    assert rows(tables["0-1"]) == {"option": ["low", "high"], "model.init_args.lr": ["0.1", "0.2"]}
    assert rows(tables["0-2"])["model.init_args.extra"] == ["nothing", "x &lt; y"]
    assert set(tables) == {"0-1", "0-2", "1-2"} and page.count("<select") == 2
    assert "same config" in page_of(runs[:2], tmp_path)


def test_the_worst_drawn_images_stand_side_by_side(runs, tmp_path):
    page = page_of(runs, tmp_path)
    # means of the experiments: low 30 and 32, high 50 and 50
    titles = re.findall(r"<h3>(.*?) <span class=\"quiet\">mean (.*?)</span>", page)
    assert titles == [("day: a b", "40.5"), ("day: easy", "90.5")]
    assert "drawn 2 of the 3 images" in page
    assert page.count("<figure") == 2 * (2 + 4) and "low-1: <b>32.0</b>" in page
    assert len(re.findall("<h3>", page_of(runs, tmp_path, "--worst", "1"))) == 1


def test_a_picture_that_one_run_lacks_is_told(runs, tmp_path):
    (runs[1] / "test/own-last/pictures/day-a_b.png").unlink()
    assert "low-1: <b>32.0</b> (not drawn)" in page_of(runs, tmp_path)


def test_image_truth_and_prediction_are_cut_out_of_a_picture():
    rng = np.random.default_rng(0)
    image = np.zeros((SIZE, SIZE, 3), np.uint8)  # black as the frames of the legend
    truth, prediction = rng.integers(0, 11, (2, SIZE, SIZE), np.uint8)
    picture = comparison(image, truth, prediction, TABLE.names, TABLE.colors)
    cut = panels(Image.fromarray(picture))
    factor = cut[0].width // SIZE
    for panel, expected in zip(
        cut, (image, colorize(truth, TABLE.colors), colorize(prediction, TABLE.colors)), strict=True
    ):
        assert np.array_equal(np.asarray(panel)[::factor, ::factor], expected)
        assert panel.size == (SIZE * factor, SIZE * factor)
    assert panels(Image.new("RGB", (64, 64))) == []


def test_the_page_asks_for_nothing_and_is_small(runs, tmp_path):
    page = page_of(runs, tmp_path)
    assert not re.search(r"https?:|<link|@import|url\(|<script[^>]+src", page)
    assert all(uri.startswith("data:image/") for uri in re.findall(r'src="(.*?)"', page))
    assert len(page) < 5e6 and page.count("data:image/") == 12


def test_names_are_shown_and_never_run(tmp_path):
    name = "<script>alert('x')<_script>&\""
    run = fake_run(tmp_path / f"runs/{name}", 0, model={"<b>": "</table>"}, status="failed: <img src=x>")
    images = run / "test/own-last/images.csv"
    images.write_text(images.read_text().replace("easy", "<i>easy</i>"))
    shutil.copy(
        run / "test/own-last/pictures/day-easy.png", run / "test/own-last/pictures/day-_i_easy_i_.png"
    )
    page = page_of([run, fake_run(tmp_path / "runs/other", 0)], tmp_path, "--worst", "9")
    assert page.count("<script>") == 1 and "&lt;script&gt;alert(&#x27;x&#x27;)&lt;_script&gt;" in page
    assert not re.search("<img src=x>|<i>easy", page) and "model.init_args.&lt;b&gt;" in page
    assert "failed: &lt;img src=x&gt;" in page and "&lt;/table&gt;" in page
    alone = page_of([run], tmp_path)
    assert "&lt;i&gt;easy" in alone and "<i>easy" not in alone


def test_a_folder_without_a_run_and_a_run_given_twice_are_refused(runs, tmp_path, capsys):
    for folder, found in ((tmp_path / "nowhere", "no folder of this name"), (tmp_path / "runs", "high-0")):
        error = error_of([runs[0], folder], capsys)
        assert "config.yaml and run.json" in error and found in error and "train.py" in error
        assert len(error.splitlines()) == 3
    error = error_of([runs[0], tmp_path / "runs/../runs/low-0"], capsys)
    assert "2 times" in error and "low-0" in error and len(error.splitlines()) == 3
    (runs[0] / "run.json").write_text("{")
    assert "run.json cannot be read" in error_of([runs[0]], capsys)


def test_a_run_without_scores_is_on_the_page_and_told(runs, tmp_path):
    for name in ("metrics.json", "metrics.csv"):
        (runs[1] / name).unlink()
    shutil.rmtree(runs[1] / "test")
    page = page_of(runs, tmp_path)
    assert "Without a validation mIoU yet: low-1." in page and "Not tested as own-last: low-1." in page
    assert rows(page)["low n = 2"][:3] == ["45.00", "10", "40.00"] and rows(page)["low-1"][:3] == ["–"] * 3
    alone = page_of(runs[1:2], tmp_path)
    assert "No run has logged" in alone and "No run has been tested" in alone and "by image yet" in alone


def test_runs_of_different_classes_are_told(runs, tmp_path):
    path = runs[3] / "test/own-last/metrics.json"
    path.write_text(json.dumps({"test": scores(50, ("sky", "moon"))}))
    page = page_of(runs, tmp_path)
    assert "different classes" in page and "high-1: sky, moon" in page
    assert "different classes" not in page_of(runs[:3], tmp_path)


def test_runs_of_the_same_seed_are_told(runs, tmp_path):
    again = fake_run(tmp_path / "runs/low-2", 0)
    assert "Runs of low have the same seed" in page_of([*runs, again], tmp_path)


def test_time_counts_over_all_starts_and_not_for_a_run_without_an_end(tmp_path):
    earlier = [{"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T01:00:00+00:00"}]
    run = fake_run(tmp_path / "runs/resumed", 0, earlier=earlier)
    assert rows(page_of([run], tmp_path))["resumed"][6] == "1:01:05"
    run = fake_run(tmp_path / "runs/going", 0, ended=None, status="running")
    assert rows(page_of([run], tmp_path))["going"][6] == "–"


def test_starting_needs_no_torch(runs, tmp_path):
    code = "import sys, compare; compare.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(runs[0]), "--output", str(tmp_path / "page.html")]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_a_real_run_and_its_test_are_compared(tmp_path, monkeypatch):
    import importlib.util

    from train import main as train

    spec = importlib.util.spec_from_file_location("test_script", ROOT / "test.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "c.yaml", tiny_config())
    train(["--config", str(config), "--output", "tiny-0", "--seed_everything", "3"])
    script.main(["tiny-0", "--checkpoint", "last"])
    page = page_of(["tiny-0"], tmp_path)
    found = json.loads(Path("tiny-0/test/own-last/metrics.json").read_text())["test"]
    means = [*(part["mIoU"] for part in found["sets"].values()), found["mean"]["mIoU"]]
    assert rows(page)["tiny-0"][-3:] == [f"{value:.2f}" for value in means]
    assert rows(page)["tiny-0"][3:6] == ["3", "finished", "2"]
    assert page.count("<h3>") == 6 and page.count("(not drawn)") == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium: apt-get install chromium")
def test_a_browser_shows_the_page_and_the_differences_of_the_chosen_configs(runs, tmp_path):
    third = fake_run(tmp_path / "runs/third", 0, 0.3)
    page_of([*runs, third], tmp_path)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,3000"]
    page = (tmp_path / "out/page.html").as_uri()

    def browse(*more: str) -> str:
        command = ["chromium", *options, *more, page]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    tables = dict(re.findall(r'data-pair="(.*?)"(.*?)</table>', browse("--dump-dom"), re.S))
    # Without its script the page would show all of the pairs.
    assert [pair for pair, rest in tables.items() if not rest.startswith(' hidden=""')] == ["0-1"]
    assert "model.init_args.lr" in tables["0-1"]
    browse(f"--screenshot={tmp_path / 'page.png'}")
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert picture.shape == (3000, 1400, 3)
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):  # of the experiments
        assert (picture == color).all(-1).sum() > 1000
