"""The script writes the counts that training reads, for one data set or for the source of an adaptation."""

import numpy as np
import pytest

from config_files import UsageError
from datamodules.mini_world.dataset import MiniStreetDataset
from datamodules.rare_classes import count_pixels, read_counts
from scripts.count_classes import main
from tests.tiny_run import write_config

STREET = {
    "class_path": "datamodules.mini_world.datamodule.MiniStreetDataModule",
    "init_args": {"size": 64, "train_length": 4, "eval_length": 1},
}


def test_the_source_of_an_adaptation_is_counted_to_where_its_config_reads_it(tmp_path, capsys):
    path = tmp_path / "new" / "counts.json"
    options = {
        "source": STREET,
        "target": {"class_path": "datamodules.nowhere.Missing"},  # its files may be on another machine
        "rare_class_sampling": {"statistics": str(path)},
    }
    adaptation = {"class_path": "datamodules.adaptation.AdaptationDataModule", "init_args": options}
    main(["--config", str(write_config(tmp_path / "c.yaml", {"data": adaptation}))])
    dataset = MiniStreetDataset("train", 4, size=64)
    pixels = count_pixels(dataset)
    assert np.array_equal(read_counts(path, dataset), pixels)
    assert [p.name for p in path.parent.iterdir()] == ["counts.json"]
    assert f"4 labels with {pixels.any(0).sum()} classes counted: {path}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not of these labels"):
        read_counts(path, MiniStreetDataset("train", 4, size=64, offset=1))


def test_any_datamodule_is_counted_to_a_given_file_and_the_workers_do_not_matter(tmp_path):
    config = str(write_config(tmp_path / "c.yaml", {"data": STREET}))
    for workers in ("0", "2"):
        main(["--config", config, "--output", str(tmp_path / workers), "--workers", workers])
    assert (tmp_path / "0").read_text() == (tmp_path / "2").read_text()


@pytest.mark.parametrize(
    ("config", "message"), [({"data": STREET}, "--output FILE"), ({"model": {}}, "no section data")]
)
def test_what_is_missing_in_a_config_is_named(tmp_path, config, message):
    with pytest.raises(UsageError, match=message):
        main(["--config", str(write_config(tmp_path / "c.yaml", config))])


def test_an_interrupted_count_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    output = tmp_path / "counts.json"
    output.write_text("before")
    monkeypatch.setattr("scripts.count_classes.count_pixels", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--config", str(write_config(tmp_path / "c.yaml", {"data": STREET})), "--output", str(output)])
    assert output.read_text() == "before"
