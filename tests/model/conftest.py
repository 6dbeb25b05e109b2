"""Process groups of one, and a builder of tiny models."""

import pytest
import torch
from model_cases import tiny_config

from moss_train.model.video_model import VideoModel
from moss_train.parallel import groups


@pytest.fixture(scope="module")
def parallel_state():
    yield groups.initialize()
    groups.shutdown()


@pytest.fixture
def build(parallel_state):
    """`build(**changes)`: a tiny model with the same seed and non-zero gates everywhere."""

    def make(**changes) -> VideoModel:
        torch.manual_seed(7)
        model = VideoModel(tiny_config(**changes), parallel_state.tensor_group)
        with torch.no_grad():
            for name, parameter in model.vision_tower.named_parameters():
                if name.endswith("gate"):
                    parameter.fill_(0.4)
        return model.eval()

    return make
