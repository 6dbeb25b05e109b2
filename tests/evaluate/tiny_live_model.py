"""A tiny real model that speaks and is silent, for the tests of live streams."""

import torch

from moss_train.model.config import ModelConfig, TextConfig, VisionConfig
from moss_train.model.video_model import VideoModel
from moss_train.parallel import groups
from moss_train.streams.tokenizer import StreamTokenizer

SIZE = 28


def live_model(tokenizer: StreamTokenizer) -> VideoModel:
    """Starts the process groups of one process."""
    sizes = ModelConfig(
        name="live",
        vision=VisionConfig(
            hidden_size=16, local_layers=1, global_layers=1, attention_heads=2, mlp_size=32, patch_size=7,
            image_size=SIZE, intermediate_layers=[0],
        ),
        text=TextConfig(
            vocabulary_size=tokenizer.vocabulary_size, hidden_size=32, layers=3, cross_layers=[1], attention_heads=4,
            key_value_heads=2, mlp_size=48, rope_scaling=None,
        ),
        pool_stride=2,
        initial_gate=0.5,
    )  # fmt: skip
    state = groups.initialize()
    torch.manual_seed(3)
    model = VideoModel(sizes, state.tensor_group)
    with torch.no_grad():  # an untrained model would say the same everywhere; make its predictions differ
        for parameter in model.parameters():
            parameter.mul_(3.0)
        model.head.weight[tokenizer.special.silence].mul_(4.0)
    return model.eval()
