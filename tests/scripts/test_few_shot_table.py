"""The comparison of few-shot tests: pairs of episodes, intervals, and what cannot be compared."""

import numpy as np
import pytest

from config_files import UsageError
from scripts.few_shot_table import compare, main, markdown, read_episodes, read_tests

HEADER = "set,episode,class,true_negative,false_positive,false_negative,true_positive\n"


def rows(correct: np.ndarray, size: int = 100) -> np.ndarray:
    """Episodes of classes 1 and 2 in turn whose union is `size` pixels, of which so many are right."""
    count = len(correct)
    zeros = np.zeros(count, int)
    return np.stack(
        [np.arange(count), 1 + np.arange(count) % 2, zeros, size - correct, zeros, correct], 1
    ).astype(int)


def test_a_constant_gain_on_noisy_episodes_has_a_narrow_interval():
    correct = np.random.default_rng(0).integers(0, 90, 200)
    tests = [{"plain": rows(correct), "better": rows(correct + 5)}]
    scores, differences = compare([tests, tests], draws=300)
    assert scores["plain"].shape == (1, 2) and scores["plain"][0, 0] == pytest.approx(correct.mean(), abs=0.5)
    value, low, high = differences["better", "plain"]
    assert value == pytest.approx(5) and low == pytest.approx(5) and high == pytest.approx(5)


def test_an_interval_of_noise_holds_zero():
    generator = np.random.default_rng(1)
    one, other = (rows(generator.integers(0, 90, 400)) for _ in range(2))
    _, differences = compare([[{"one": one, "other": other}]], draws=500)
    value, low, high = differences["other", "one"]
    assert low < 0 < high and low < value < high


def test_seeds_are_averaged_and_their_spread_told():
    tests = [{"a": rows(np.full(10, 20))}, {"a": rows(np.full(10, 40))}]
    text = markdown(*compare([tests], draws=10))
    assert "| a | 30.0 | 30.0 ± 14.1 |" in text


def test_sets_of_other_episodes_are_refused():
    other = rows(np.full(10, 3))
    other[:, 1] = 1
    with pytest.raises(UsageError, match="'b' has other episodes"):
        compare([[{"a": rows(np.full(10, 3)), "b": other}]], draws=10)


def write_test(folder, *names: str, correct: int = 50, count: int = 6) -> str:
    folder.mkdir(parents=True)
    lines = [f"{s},{','.join(map(str, r))}\n" for s in names for r in rows(np.full(count, correct))]
    (folder / "episodes.csv").write_text(HEADER + "".join(lines))
    return str(folder)


def test_sets_of_several_runs_are_joined_by_commas(tmp_path):
    one, other = write_test(tmp_path / "a", "plain"), write_test(tmp_path / "b", "helped", correct=60)
    (test,) = read_tests(f"{one},{other}")
    assert list(test) == ["plain", "helped"]
    assert compare([[test]], draws=10)[1]["helped", "plain"][0] == pytest.approx(10)
    with pytest.raises(UsageError, match="'plain' twice"):
        read_tests(f"{one},{one}")


def test_lists_of_several_seeds_count_like_runs_of_several_seeds(tmp_path):
    folder = write_test(tmp_path / "a", "1-shot seed 510", "1-shot seed 365", "aux seed 510", "aux seed 365")
    found = read_tests(folder)
    assert [list(test) for test in found] == [["1-shot", "aux"]] * 2
    assert list(read_tests(write_test(tmp_path / "b", "seg-1", "seg-2"))[0]) == ["seg-1", "seg-2"]
    with pytest.raises(UsageError, match="same seeds"):
        read_tests(write_test(tmp_path / "c", "1-shot seed 510", "1-shot seed 365", "aux seed 510"))


def test_folds_of_other_sets_and_runs_of_other_episodes_are_refused(tmp_path, capsys):
    one, other = write_test(tmp_path / "a", "plain"), write_test(tmp_path / "b", "helped")
    short = write_test(tmp_path / "c", "plain", count=4)
    for words, reason in (
        (["--fold", one, "--fold", other], "1 of plain; 1 of helped"),
        (["--fold", one, short], "have 4 and 6 episodes"),
    ):
        with pytest.raises(SystemExit):
            main([*words, "--draws", "5"])
        assert reason in capsys.readouterr().err


def test_files_are_read_and_the_table_is_written(tmp_path, capsys):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        lines = [f"{s},{','.join(map(str, r))}\n" for s in ("1-shot", "5-shot") for r in rows(np.full(6, 50))]
        (tmp_path / name / "episodes.csv").write_text(HEADER + "".join(lines))
    assert list(read_episodes(tmp_path / "x")) == ["1-shot", "5-shot"]
    folds = ["--fold", str(tmp_path / "x"), "--fold", str(tmp_path / "y")]
    main([*folds, "--draws", "20", "--output", str(tmp_path / "table.md")])
    assert "| 5-shot, against 1-shot | +0.00 | +0.00 to +0.00 |" in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit):
        main(["--fold", str(tmp_path / "none")])
    assert "episodes.csv is missing" in capsys.readouterr().err
