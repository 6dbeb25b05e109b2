"""The model without the video additions is Llama-3.2-Vision: compared with transformers' own Mllama, fp32."""

from pathlib import Path

import numpy as np
import torch
from model_cases import pack, stream
from safetensors.torch import save_file

from moss_train.checkpoint.hugging_face.mapping import export_tensors, normalise_reference_name
from moss_train.checkpoint.hugging_face.source import HuggingFaceSource, SafetensorsFiles
from moss_train.engines.weights import load_weights_into
from moss_train.model.config import ModelConfig, RopeScaling, TextConfig, VisionConfig
from moss_train.model.video_model import VideoModel

LAYERS, CROSS = 5, [1, 3]


def transformers_model():
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    vision = MllamaVisionConfig(
        hidden_size=32, num_hidden_layers=4, num_global_layers=2, attention_heads=2, intermediate_size=48,
        vision_output_dim=96, image_size=28, patch_size=7, max_num_tiles=1, intermediate_layers_indices=[0, 2],
        supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    text = MllamaTextConfig(
        vocab_size=96, hidden_size=48, num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=64, cross_attention_layers=CROSS, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    torch.manual_seed(3)
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=96)
    model = MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if "gate" in name else 0.15))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def our_model(parallel_state, weights: dict[str, torch.Tensor], folder: Path) -> VideoModel:
    config = ModelConfig(
        name="llama",
        vision=VisionConfig(
            hidden_size=32, local_layers=4, global_layers=2, attention_heads=2, mlp_size=48, patch_size=7,
            image_size=28, max_tiles=1, aspect_ratios=1, full_attention=False,
            # transformers 5 counts the *outputs* of local layers, the reference (4.46) their inputs.
            intermediate_layers=[1, 3],
        ),
        text=TextConfig(
            vocabulary_size=96, hidden_size=48, layers=LAYERS, cross_layers=CROSS, attention_heads=6,
            key_value_heads=2, mlp_size=64, rope_theta=10000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
        ),
        pool="none",
        cross_rope=False,
        reference_compat=True,
    )  # fmt: skip
    model = VideoModel(config, parallel_state.tensor_group)
    save_file(weights, folder / "model.safetensors")
    load_weights_into(model, HuggingFaceSource(SafetensorsFiles(folder), model))
    return model


def test_agrees_with_transformers(parallel_state, tmp_path):
    """Logits within 2e-5, loss within 1e-5, every gradient's norm within 1e-4 relative; leak included."""
    theirs = transformers_model()
    ours = our_model(parallel_state, theirs.state_dict(), tmp_path)
    batch = pack([[stream(np.random.default_rng(0), frames=3, leading=4, window=2)]])
    frames = batch.frames_NCHW.shape[0]
    batch.frames_NCHW = torch.randn(frames, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    frame = torch.arange(frames)
    visible = (frame >= batch.visible_lo_RT[..., None]) & (frame < batch.visible_hi_RT[..., None])

    # One image a frame, one tile an image.
    expected = theirs(
        input_ids=batch.ids_RT,
        pixel_values=batch.frames_NCHW[None, :, None],
        aspect_ratio_ids=torch.ones(1, frames, dtype=torch.long),
        aspect_ratio_mask=torch.ones(1, frames, 1, dtype=torch.long),
        cross_attention_mask=visible[..., None].long(),
        use_cache=False,
    ).logits
    logits = ours(batch).transpose(0, 1)
    torch.testing.assert_close(logits, expected[..., :96], atol=2e-5, rtol=0)

    targets = batch.ids_RT[:, 1:].clamp(max=95).flatten()
    loss_ours = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
    loss_theirs = torch.nn.functional.cross_entropy(expected[:, :-1, :96].flatten(0, 1), targets)
    torch.testing.assert_close(loss_ours, loss_theirs, atol=1e-5, rtol=0)
    loss_ours.backward()
    loss_theirs.backward()
    gradients = export_tensors(ours, {n: p.grad for n, p in ours.named_parameters()})
    compared = 0
    for name, parameter in theirs.named_parameters():
        norm = parameter.grad.norm()
        assert (gradients[normalise_reference_name(name)].norm() - norm).abs() <= 1e-4 * norm.clamp(min=1e-5), name
        compared += 1
    assert compared == len(gradients)


def test_import_then_export_is_bit_identical(parallel_state, tmp_path):
    theirs = transformers_model()
    ours = our_model(parallel_state, theirs.state_dict(), tmp_path)
    exported = export_tensors(ours, {n: p.detach() for n, p in ours.named_parameters()})
    state = {normalise_reference_name(name): tensor for name, tensor in theirs.state_dict().items()}
    assert exported.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(exported[name], tensor), name
