import numpy as np
from PIL import Image

from datamodules.mini_world.street import CONDITIONS, render_street
from scripts.demo_images import main


def test_the_images_are_test_scenes_whose_conditions_take_turns(tmp_path, capsys):
    main(["--output", str(tmp_path / "new" / "images"), "--count", "6"])
    names = sorted(path.name for path in (tmp_path / "new" / "images").iterdir())
    assert names == [f"{i:03d}-{condition}.png" for i, condition in enumerate([*CONDITIONS, CONDITIONS[0]])]
    night = np.asarray(Image.open(tmp_path / "new" / "images" / "001-night.png"))
    assert (night == render_street("test", 1, condition="night")["rgb"]).all()
    assert "6 images" in capsys.readouterr().out


def test_the_images_have_the_size_that_is_asked_for(tmp_path):
    main(["--output", str(tmp_path), "--count", "1", "--size", "64"])
    assert [Image.open(path).size for path in tmp_path.iterdir()] == [(64, 64)]
