"""Surroundings that are not those of a desktop: a run goes through, or names what to set (F33)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import tiny_config, write_config

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(folder: Path, environment: dict[str, str | None], before=(), **data) -> subprocess.CompletedProcess:
    """Train the tiny run in a changed environment (None: unset), behind the words of `before`."""
    config = tiny_config(**{"num_workers": 2, **data}) | {"wandb": {"mode": "offline"}}
    path = write_config(folder / "tiny.yaml", config)
    given = {key: value for key, value in (dict(os.environ) | environment).items() if value is not None}
    words = [sys.executable, "train.py", "--config", str(path), "--output", str(folder / "run")]
    return subprocess.run(
        [*before, *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env=given, timeout=240
    )


def assert_finished(done: subprocess.CompletedProcess, folder: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run/run.json").read_text("utf-8"))["status"] == "finished"
    assert (folder / "run/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": None, "PYTHONIOENCODING": None},
        {"HOME": None, "XDG_CACHE_HOME": None, "XDG_CONFIG_HOME": None, "XDG_DATA_HOME": None},
        {"HOME": "/proc", "XDG_CACHE_HOME": None, "XDG_CONFIG_HOME": None, "XDG_DATA_HOME": None},
    ],
    ids=["locale C", "no HOME", "HOME that cannot be written"],
)
def test_a_run_goes_through_in_a_folder_with_spaces_and_other_letters(tmp_path, environment):
    folder = tmp_path / "données größe 数据"
    folder.mkdir()
    assert_finished(run(folder, environment), folder)


def small_shared_memory() -> list[str]:
    """Command that runs another with 64 kB of shared memory; skips where that is not allowed."""
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"',
        "sh",
    ]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    return command


def test_too_little_shared_memory_is_named_and_without_workers_none_is_needed(tmp_path):
    before = small_shared_memory()
    done = run(tmp_path, {}, before, size=128)
    assert done.returncode == 1 and "error: A data worker has no shared memory left" in done.stderr, (
        done.stderr
    )
    assert "/dev/shm" in done.stderr and "data.init_args.num_workers (now 2)" in done.stderr
    (tmp_path / "alone").mkdir()
    assert_finished(run(tmp_path / "alone", {}, before, size=128, num_workers=0), tmp_path / "alone")
