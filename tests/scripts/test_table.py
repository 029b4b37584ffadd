import json

import pytest

from config_files import UsageError
from scripts.table import main, table


def write_result(folder, day, night):
    folder.mkdir()
    sets = {"day": {"mIoU": day}, "night": {"mIoU": night}}
    (folder / "metrics.json").write_text(
        json.dumps({"test": {"sets": sets, "mean": {"mIoU": (day + night) / 2}}})
    )
    return str(folder)


def test_a_row_holds_mean_and_deviation_over_its_runs(tmp_path, capsys):
    folders = [write_result(tmp_path / str(i), 40 + 2 * i, 20) for i in range(3)]
    main(["--row", "trained", *folders, "--row", "single", folders[0]])
    printed = capsys.readouterr().out
    assert "| trained | 3 | 42.0 ± 2.0 | 20.0 ± 0.0 | 31.0 ± 1.0 |" in printed
    assert "| single | 1 | 40.0 | 20.0 | 30.0 |" in printed


def test_runs_scored_on_other_sets_are_not_averaged():
    with pytest.raises(UsageError, match="score all on the same"):
        table({"a": [{"day": 1.0}], "b": [{"night": 1.0}]})


def test_scores_of_a_validation_are_not_taken_for_test_scores(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"val": {"sets": {}, "mean": {}}}))
    with pytest.raises(UsageError, match="no test scores, found val"):
        main(["--row", "x", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--row", "x"], "names no folder"), (["--row", "x", "a", "--row", "x", "b"], "given twice")],
)
def test_a_row_without_folders_or_given_twice_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


def test_a_folder_without_result_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"test\.py wrote"):
        main(["--row", "x", str(tmp_path)])
