"""The reference's (Hugging Face Mllama) parameter names, as a table a reader can check by eye.

`*` stands for a layer index. Every tensor keeps its shape and values, with one exception: the reference's
embedding holds the vocabulary and the input-only rows in one table, ours holds them apart (`_EMBEDDING`).
Channel orders that bite (the interleaved intermediate maps in the projector's input) are the same on both sides,
because the model computes them in the reference's order.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from moss_train.errors import CheckpointError
from moss_train.model.layers import CrossLayer

VISION_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention_norm.bias": "input_layernorm.bias",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.bias": "post_attention_layernorm.bias",
    "mlp.up.weight": "mlp.fc1.weight",
    "mlp.up.bias": "mlp.fc1.bias",
    "mlp.down.weight": "mlp.fc2.weight",
    "mlp.down.bias": "mlp.fc2.bias",
    "attention_gate": "gate_attn",
    "mlp_gate": "gate_ffn",
}

DECODER_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}

SELF_LAYER = DECODER_LAYER | {
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
}

CROSS_LAYER = DECODER_LAYER | {
    "attention.query.weight": "cross_attn.q_proj.weight",
    "attention.key.weight": "cross_attn.k_proj.weight",
    "attention.value.weight": "cross_attn.v_proj.weight",
    "attention.output.weight": "cross_attn.o_proj.weight",
    "attention.query_norm.weight": "cross_attn.q_norm.weight",
    "attention.key_norm.weight": "cross_attn.k_norm.weight",
    "attention_gate": "cross_attn_attn_gate",
    "mlp_gate": "cross_attn_mlp_gate",
}

OUTSIDE_LAYERS = {
    "vision_tower.patch_embedding.weight": "vision_model.patch_embedding.weight",
    "vision_tower.class_embedding": "vision_model.class_embedding",
    "vision_tower.positions.embedding": "vision_model.gated_positional_embedding.embedding",
    "vision_tower.positions.gate": "vision_model.gated_positional_embedding.gate",
    "vision_tower.positions.tile_embedding.weight": "vision_model.gated_positional_embedding.tile_embedding.weight",
    "vision_tower.pre_tile.embedding.weight": "vision_model.pre_tile_positional_embedding.embedding.weight",
    "vision_tower.pre_tile.gate": "vision_model.pre_tile_positional_embedding.gate",
    "vision_tower.post_tile.embedding.weight": "vision_model.post_tile_positional_embedding.embedding.weight",
    "vision_tower.post_tile.gate": "vision_model.post_tile_positional_embedding.gate",
    "vision_tower.norm_pre.weight": "vision_model.layernorm_pre.weight",
    "vision_tower.norm_pre.bias": "vision_model.layernorm_pre.bias",
    "vision_tower.norm_post.weight": "vision_model.layernorm_post.weight",
    "vision_tower.norm_post.bias": "vision_model.layernorm_post.bias",
    "projector.weight": "multi_modal_projector.weight",
    "projector.bias": "multi_modal_projector.bias",
    "final_norm.weight": "language_model.model.norm.weight",
    "head.weight": "language_model.lm_head.weight",
}

_EMBEDDING = "language_model.model.embed_tokens.weight"
_EMBEDDING_PARTS = ("embedding.text.weight", "embedding.extra")


def reference_names(model) -> dict[str, str]:
    """Our name → the reference's, for every parameter but the two parts of the embedding."""
    names = dict(OUTSIDE_LAYERS)
    for ours, theirs in (("local_layers", "transformer"), ("global_layers", "global_transformer")):
        for index, layer in enumerate(getattr(model.vision_tower, ours)):
            present = {name for name, _ in layer.named_parameters()}
            for name, reference in VISION_LAYER.items():
                if name in present:
                    names[f"vision_tower.{ours}.{index}.{name}"] = f"vision_model.{theirs}.layers.{index}.{reference}"
    for layer in model.decoder_layers:
        for name, reference in (CROSS_LAYER if isinstance(layer, CrossLayer) else SELF_LAYER).items():
            names[f"layers.{layer.index}.{name}"] = f"language_model.model.layers.{layer.index}.{reference}"
    return names


def normalise_reference_name(name: str) -> str:
    """The name in the layout the reference saves, from that of any transformers version.

    Versions from 4.52 on put `model.` before the parts and keep `lm_head` outside of them.
    """
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = re.sub(r"^model\.(?=(vision_model|language_model|multi_modal_projector)\.)", "", name)
    return re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)


def import_weights(model, weights: Mapping[str, torch.Tensor], origin: str) -> None:
    """Copy the reference's tensors into `model`, a whole one, in place and bit-exactly.

    `weights` and errors are those of `canonical_weights`; nothing is copied when there is an error.
    """
    found = canonical_weights(model, weights, origin)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])


def canonical_weights(model, weights: Mapping[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """The reference's tensors under the names of `model`, a whole one, which may be on the meta device. No copies.

    `weights` are keyed by the reference's names. CheckpointError lists, all at once, every parameter that is
    missing, every tensor that has no place in the model, and every shape that differs.
    """
    weights = {normalise_reference_name(name): tensor for name, tensor in weights.items()}
    parameters = dict(model.named_parameters())
    wanted = {reference: ours for ours, reference in reference_names(model).items()}
    rows = [tuple(parameters[part].shape) for part in _EMBEDDING_PARTS]
    shapes = {reference: tuple(parameters[ours].shape) for reference, ours in wanted.items()}
    shapes[_EMBEDDING] = (rows[0][0] + rows[1][0], rows[0][1])
    problems = [f"missing {name} {shapes[name]}" for name in sorted(shapes.keys() - weights.keys())]
    problems += [f"unexpected {name} {tuple(weights[name].shape)}" for name in sorted(weights.keys() - shapes.keys())]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, the model needs {shapes[name]}"
        for name in sorted(shapes.keys() & weights.keys())
        if tuple(weights[name].shape) != shapes[name]
    ]
    if problems:
        kinds = ", ".join(
            f"{sum(problem.startswith(word) for problem in problems)} {word}" for word in ("missing", "unexpected")
        )
        misshaped = sum(not problem.startswith(("missing", "unexpected")) for problem in problems)
        raise CheckpointError(
            f"{origin} does not fit the model: {kinds}, {misshaped} of another shape\n  " + "\n  ".join(problems)
        )
    parts = weights[_EMBEDDING].split([shape[0] for shape in rows])
    return {ours: weights[reference] for reference, ours in wanted.items()} | dict(
        zip(_EMBEDDING_PARTS, parts, strict=True)
    )


def export_tensors(model, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors keyed by our parameter names (weights, or gradients) under the reference's names."""
    exported = {reference: tensors[ours] for ours, reference in reference_names(model).items()}
    exported[_EMBEDDING] = torch.cat([tensors[part] for part in _EMBEDDING_PARTS])
    return exported


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file, backed by it until they are copied; CheckpointError when it is missing or is
    not one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # safetensors raises its own error type for a damaged header
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
