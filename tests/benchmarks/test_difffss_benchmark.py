import json

import pytest
import torch

from benchmarks import difffss
from benchmarks.plain_difffss import plain_images
from tests.tiny_difffss import tiny_generator, write_tiny_models

CONTROL = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
ARGUMENTS = ("a photo of a plane", "a dog", CONTROL, [3, 4])


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_tiny_models(folder)
    return tiny_generator(folder, steps=4)


def test_the_released_order_draws_the_images_of_the_generator(generator):
    torch.testing.assert_close(plain_images(generator, *ARGUMENTS), generator(*ARGUMENTS), rtol=0, atol=1e-4)


def test_the_released_order_runs_the_unet_once_for_each_image_step_and_prompt(generator):
    calls, texts = [], []
    hooks = [
        generator.diffusion.unet.register_forward_pre_hook(lambda _, given: calls.append(len(given[0]))),
        generator.diffusion.text_encoder.register_forward_hook(lambda *_: texts.append(1)),
    ]
    plain_images(generator, *ARGUMENTS)
    for hook in hooks:
        hook.remove()
    assert calls == [1] * (2 * 4 * 2) and len(texts) == 4


def test_a_record_has_images_per_minute_of_all_orders(generator, monkeypatch, tmp_path):
    monkeypatch.setattr(difffss, "load", lambda steps: (generator, CONTROL))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    difffss.main(["--number", "2", "--pairs", "2", "--output", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    for name in ("one at a time", "released order"):
        found = record["cpu"][f"against {name}"]
        assert found["images_per_minute"]["batch"] == pytest.approx(120 / found["ours_s"])
        assert found["images_per_minute"][name] == pytest.approx(120 / found["plain_s"])
    assert max(record["cpu"]["largest_difference"].values()) <= 2 / 255
    assert record["cuda, Stable Diffusion 1.5"].startswith("left out")


def test_orders_that_do_not_agree_are_not_timed(generator, monkeypatch):
    monkeypatch.setattr(difffss, "plain_images", lambda *arguments: 1 - plain_images(*arguments))
    with pytest.raises(RuntimeError, match="does not draw the images"):
        difffss.measure(generator, CONTROL, 1, 2, difffss.TOLERANCE)


@pytest.mark.parametrize("words", [["--pairs", "1"], ["--number", "0"], ["--steps", "7"]])
def test_numbers_that_cannot_be_measured_end_the_command(words):
    with pytest.raises(SystemExit):
        difffss.main(words)
