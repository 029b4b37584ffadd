import numpy as np
import pytest
from PIL import Image

from functional.classes import DELIVER11
from scripts.gallery import enlarge, grid, legend, main, richest_scenes, with_text


def test_the_command_writes_four_sheets_small_enough_to_commit(tmp_path, capsys):
    main(["--output", str(tmp_path / "sheets"), "--scenes", "2", "--search", "3"])
    files = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert files == [
        "object_categories.png",
        "object_scenes.png",
        "street_conditions.png",
        "street_scenes.png",
    ]
    printed = capsys.readouterr().out
    for name in files:
        path = tmp_path / "sheets" / name
        assert path.stat().st_size < 600_000 and min(Image.open(path).size) > 100
        assert name in printed


def test_more_scenes_make_a_taller_sheet_and_a_longer_search_finds_richer_ones(tmp_path):
    heights = []
    for scenes in ("1", "6"):
        main(["--output", str(tmp_path), "--scenes", scenes, "--search", "6"])
        heights.append(Image.open(tmp_path / "object_scenes.png").height)
    assert heights[1] > 1.5 * heights[0]
    assert richest_scenes(1, 1) == [0] and richest_scenes(1, 30) != [0]


def test_tiles_fill_rows_from_the_left():
    tiles = [np.full((2, 3, 3), value, np.uint8) for value in (1, 2, 3)]
    sheet = grid(tiles, 2)
    assert sheet[0, 0, 0] == 1 and sheet[0, 7, 0] == 2 and sheet[6, 0, 0] == 3 and sheet[6, 7, 0] == 255


def test_tiles_without_a_gap_touch_and_each_pixel_is_enlarged():
    tiles = [np.full((2, 3, 3), 10 * (i // 2) + i % 2, np.uint8) for i in range(6)]
    assert grid(tiles, 2, gap=0).shape == (6, 6, 3)
    large = enlarge(grid(tiles, 2, gap=0), 2)
    assert large.shape == (12, 12, 3)
    assert large[0, 0, 0] == 0 and large[0, 6, 0] == 1 and large[4, 0, 0] == 10 and large[11, 11, 0] == 21


def test_a_text_that_does_not_fit_below_its_picture_is_an_error():
    picture = np.zeros((10, 60, 3), np.uint8)
    assert with_text(picture, "a cat", 1).shape[0] > 10
    with pytest.raises(ValueError, match="allow more"):
        with_text(picture, "a photo of a cat and a mug", 1)


def test_the_legend_shows_the_colour_of_every_class():
    colors = {tuple(color) for color in legend(DELIVER11, 400).reshape(-1, 3).tolist()}
    assert set(DELIVER11.colors) <= colors
