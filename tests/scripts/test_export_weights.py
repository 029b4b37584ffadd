"""The network of a run as one file: all its weights, from which another network starts."""

import pytest
import torch
from safetensors.torch import load_file

from cli import load_model
from scripts.export_weights import main
from tests.tiny_run import tiny_config, write_config
from train import main as train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder / "c.yaml", tiny_config())
    train(["--config", str(config), "--output", str(folder / "run")])
    return folder / "run"


def test_all_weights_of_the_network_are_in_the_file(run, tmp_path, capsys):
    main([str(run), str(tmp_path / "out/weights.safetensors")])
    network = load_model(run, "last")[0].network
    found = load_file(tmp_path / "out/weights.safetensors")
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in network.state_dict().items())
    assert "tensors" in capsys.readouterr().out


def test_half_precision_halves_floats(run, tmp_path):
    main([str(run), str(tmp_path / "half.safetensors"), "--half"])
    kinds = {v.dtype for v in load_file(tmp_path / "half.safetensors").values()}
    assert torch.float16 in kinds and torch.float32 not in kinds


def test_a_folder_without_checkpoint_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none"), str(tmp_path / "x.safetensors")])
    assert "none" in capsys.readouterr().err
