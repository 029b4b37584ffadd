from functools import partial

import pytest

from tests.tiny_madm import tiny_madm
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    return write_tiny_model(place, widths=(8, 16, 16, 16), vae_widths=(8, 8), heads=1)


@pytest.fixture
def build(model_folder):
    """Build the same tiny MADMTraining at each call; options of the network as a dict."""
    return partial(tiny_madm, model_folder)
