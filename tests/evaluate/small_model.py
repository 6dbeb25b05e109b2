"""A model of the real kind with a few thousand parameters, whose predictions differ from place to place."""

import torch

from moss_train.model.config import ModelConfig, TextConfig, VisionConfig
from moss_train.model.video_model import VideoModel
from moss_train.parallel import groups
from moss_train.streams.tokenizer import StreamTokenizer

SIZE = 28


def small_model(tokenizer: StreamTokenizer, silence: float = 4.0, layers: int = 4) -> VideoModel:
    """Fresh weights made three times as large, since an untrained model would say the same everywhere; silence's row
    of the head is made larger by a further factor. In evaluation mode; starts the process groups of one process."""
    tensor_group = groups.initialize().tensor_group  # it seeds, when it is called first
    torch.manual_seed(3)
    sizes = ModelConfig(
        name="test",
        vision=VisionConfig(
            hidden_size=16,
            local_layers=2,
            global_layers=1,
            attention_heads=2,
            mlp_size=32,
            patch_size=7,
            image_size=SIZE,
            intermediate_layers=[1],
        ),
        text=TextConfig(
            vocabulary_size=tokenizer.vocabulary_size,
            hidden_size=32,
            layers=layers,
            cross_layers=list(range(1, layers, 2)),
            attention_heads=4,
            key_value_heads=2,
            mlp_size=64,
            rope_scaling=None,
        ),
        pool_stride=2,
        initial_gate=0.5,
    )
    built = VideoModel(sizes, tensor_group)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(3.0)
        built.head.weight[tokenizer.special.silence].mul_(silence)
    return built.eval()
