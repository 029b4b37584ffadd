"""A video goes frame by frame into one picture of ids each and a video of overlays."""

import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import video
from config_files import UsageError
from functional.palette import overlay
from tests.tiny_video import random_frames, save_video
from video import check_kept_answers, label_video, open_video, read_frames, save_png, write_video

av = pytest.importorskip("av")
COLORS = ((0, 0, 0), (200, 0, 0), (0, 200, 0))


def bright(frame) -> np.ndarray:
    """Ids by the mean of the colours."""
    return (frame.mean(-1) // 86).astype(np.uint8)


def decode(path) -> tuple:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return stream.codec_context.name, stream.average_rate, frames


@pytest.mark.parametrize("suffix", [".mov", ".avi"])
def test_the_frames_of_a_video_are_read_with_their_rate_and_number(tmp_path, suffix):
    frames = random_frames()
    path = save_video(tmp_path / f"a{suffix}", frames, Fraction(30000, 1001))
    found = open_video(path)
    assert (found.rate, found.length) == (Fraction(30000, 1001), 3)
    np.testing.assert_array_equal(list(read_frames(found)), frames)


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_a_phones_video_is_read_upright(tmp_path, turn):
    frames = random_frames()
    (first, *_) = read_frames(open_video(save_video(tmp_path / "a.mov", frames, turn=turn)))
    np.testing.assert_array_equal(first, np.rot90(frames[0], turn // 90))


def test_each_frame_leaves_its_ids_and_an_overlay_at_the_rate_of_the_source(tmp_path, capsys):
    frames = [np.full((13, 21, 3), value, np.uint8) for value in (20, 120, 250)]
    source = open_video(save_video(tmp_path / "clip.mov", frames, Fraction(30000, 1001)))
    (tmp_path / "clip_ids").mkdir()
    (tmp_path / "clip_ids/000009.png").write_text("of an earlier, longer run")
    assert label_video(source, bright, COLORS, tmp_path) == 3
    names = sorted(path.name for path in (tmp_path / "clip_ids").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png"]
    _, rate, shown = decode(tmp_path / "clip_overlay.mp4")
    assert rate == Fraction(30000, 1001) and len(shown) == 3
    for frame, picture, name in zip(frames, shown, names, strict=True):
        ids = np.asarray(Image.open(tmp_path / "clip_ids" / name))
        np.testing.assert_array_equal(ids, bright(frame))
        assert picture.shape == (14, 22, 3)  # an even size
        expected = overlay(frame, ids, COLORS).astype(int)
        assert np.abs(picture[:13, :21] - expected).max() < 16
        assert np.abs(picture[13, :21] - expected[12]).max() < 16  # no dark edge
    said = capsys.readouterr().out
    assert "3/3" in said and "frames/s" in said
    assert not list(tmp_path.glob(".*"))


def test_a_frame_is_labelled_before_the_next_one_is_read(tmp_path, monkeypatch):
    source, order = open_video(save_video(tmp_path / "a.mov", random_frames())), []

    def reading(found):
        for frame in read_frames(found):
            order.append("read")
            yield frame

    monkeypatch.setattr(video, "read_frames", reading)
    label_video(source, lambda frame: order.append("labelled") or bright(frame), COLORS, tmp_path)
    assert order == ["read", "labelled"] * 3


@pytest.mark.parametrize("encoders", [("libx264",), ("no_such_encoder", "mpeg4")])
def test_the_overlay_is_written_by_the_first_encoder_that_is_there(tmp_path, monkeypatch, encoders):
    if encoders[0] == "libx264" and "libx264" not in av.codecs_available:
        pytest.skip("this build of PyAV has no libx264")
    monkeypatch.setattr(video, "ENCODERS", {name: video.ENCODERS.get(name, {}) for name in encoders})
    frames = [np.full((16, 16, 3), (200, 40, 40 * i), np.uint8) for i in range(4)]
    # The last rate has more digits than MPEG-4 can count by.
    for rate in (Fraction(25), Fraction(1, 2), Fraction(240000, 1001)):
        with write_video(tmp_path / "a.mp4", rate) as add:
            for frame in frames:
                add(frame)
        codec, found, shown = decode(tmp_path / "a.mp4")
        assert codec == {"libx264": "h264", "mpeg4": "mpeg4"}[encoders[-1]]
        assert abs(found - rate) < 1e-4 and len(shown) == 4
        assert np.abs(np.array(shown, int) - frames).max() < 24


@pytest.mark.parametrize("after", [0, 2])
def test_a_video_that_is_broken_off_leaves_the_earlier_one(tmp_path, after):
    (tmp_path / "a.mp4").write_text("earlier")
    with pytest.raises(KeyboardInterrupt), write_video(tmp_path / "a.mp4", Fraction(10)) as add:
        for _ in range(after):
            add(np.zeros((16, 16, 3), np.uint8))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_text() == "earlier"


def test_a_picture_takes_its_place_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(np.full((2, 2), 7, np.uint8), path)

    def half(picture, place, kind):
        place.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_png(np.zeros((2, 2), np.uint8), path)
    assert (np.asarray(Image.open(path)) == 7).all()


def error_of(path) -> str:
    with pytest.raises(UsageError) as error:
        list(read_frames(open_video(path)))
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_what_is_no_video_is_named_with_what_was_found(tmp_path):
    assert "nowhere.mp4 does not exist" in error_of(tmp_path / "nowhere.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("text")
    message = error_of(text)
    assert "text.mp4 cannot be read as a video: Invalid data" in message and "(4 bytes)" in message
    assert "convert it to MP4" in message

    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", 8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux([*stream.encode(frame), *stream.encode()])
    assert "sound.mp4 cannot be read as a video: found no pictures" in error_of(sound)


def test_a_damaged_frame_is_an_error_that_counts_the_good_ones(tmp_path):
    path = save_video(tmp_path / "a.mov", random_frames())
    pieces = path.read_bytes().split(b"\x89PNG")
    path.write_bytes(b"\x89PNG".join(pieces[:3]) + b"none" + pieces[3])
    assert "Invalid data found when processing input, after frame 2" in error_of(path)


def test_without_pyav_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    path = save_video(tmp_path / "a.mov", random_frames())
    monkeypatch.setitem(sys.modules, "av", None)
    assert 'pip install -c constraints.txt -e ".[demo]"' in error_of(path)


def test_a_model_that_keeps_answers_by_name_is_refused():
    kept = SimpleNamespace(cache=SimpleNamespace(path="kept.json"))
    none, parts = SimpleNamespace(cache=None), {"candidates": None, "captioner": None}
    for model in (
        parts | {"candidates": kept},
        parts | {"captioner": kept},
        parts | {"candidates": SimpleNamespace(cache=None, captioner=kept)},
    ):
        with pytest.raises(UsageError, match=r"kept\.json .*\n.*cache: null"):
            check_kept_answers(SimpleNamespace(**model))
    check_kept_answers(SimpleNamespace(candidates=none, captioner=none))
    check_kept_answers(SimpleNamespace())
