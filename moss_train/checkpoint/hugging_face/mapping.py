"""Our parameter names beside the reference's (transformers' Mllama), as tables a reader can check by eye.

In a section's prefixes `*` stands for the number of a layer. Every row but the two of the embedding means: one tensor
on either side, of the same shape, with the same bits. The rule says why no order changes on the way.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moss_train.engines.pieces import Shape
from moss_train.model.config import ModelConfig
from moss_train.model.decision_head import PREFIX
from moss_train.model.video_model import VideoModel


@dataclass(frozen=True)
class Rule:
    """How a tensor's elements correspond, and why."""

    name: str
    why: str


SAME = Rule("same", "norms, biases, gates and linear layers [out, in] are stored alike")
HEADS = Rule(
    "heads",
    "query, key and value are three matrices on both sides, their rows head after head; rotary pairs are the channels "
    "(i, i + width/2) of a head in both, so nothing is fused, interleaved or permuted",
)
GATE_UP = Rule("gate_up", "the gate and the up matrix of a feed-forward are two tensors on both sides, not one fused")
INTERLEAVED = Rule(
    "interleaved",
    "input channels of the projector: the final map's first, then channel 0 of every intermediate map, channel 1 of "
    "every one, …; the model computes its features in this order, so the columns stay where they are",
)
TABLE = Rule(
    "table", "pre-computed: one row for each aspect-ratio id, its tiles × tokens × width flattened in this order"
)
TEXT_ROWS = Rule("text_rows", "the first rows of the reference's one embedding: as many as the head has")
EXTRA_ROWS = Rule("extra_rows", "the last rows of the reference's one embedding: input-only ids, such as the anchor's")

#: (our name, the reference's name, rule)
Row = tuple[str, str, Rule]

EMBEDDING = "language_model.model.embed_tokens.weight"

OUTSIDE_LAYERS: tuple[Row, ...] = (
    ("embedding.text.weight", EMBEDDING, TEXT_ROWS),
    ("embedding.extra", EMBEDDING, EXTRA_ROWS),
    ("final_norm.weight", "language_model.model.norm.weight", SAME),
    ("head.weight", "language_model.lm_head.weight", SAME),
    ("projector.weight", "multi_modal_projector.weight", INTERLEAVED),
    ("projector.bias", "multi_modal_projector.bias", SAME),
    ("vision_tower.patch_embedding.weight", "vision_model.patch_embedding.weight", SAME),
    ("vision_tower.class_embedding", "vision_model.class_embedding", SAME),
    ("vision_tower.positions.embedding", "vision_model.gated_positional_embedding.embedding", SAME),
    ("vision_tower.positions.gate", "vision_model.gated_positional_embedding.gate", SAME),
    (
        "vision_tower.positions.tile_embedding.weight",
        "vision_model.gated_positional_embedding.tile_embedding.weight",
        TABLE,
    ),
    ("vision_tower.pre_tile.embedding.weight", "vision_model.pre_tile_positional_embedding.embedding.weight", TABLE),
    ("vision_tower.pre_tile.gate", "vision_model.pre_tile_positional_embedding.gate", SAME),
    ("vision_tower.post_tile.embedding.weight", "vision_model.post_tile_positional_embedding.embedding.weight", TABLE),
    ("vision_tower.post_tile.gate", "vision_model.post_tile_positional_embedding.gate", SAME),
    ("vision_tower.norm_pre.weight", "vision_model.layernorm_pre.weight", SAME),
    ("vision_tower.norm_pre.bias", "vision_model.layernorm_pre.bias", SAME),
    ("vision_tower.norm_post.weight", "vision_model.layernorm_post.weight", SAME),
    ("vision_tower.norm_post.bias", "vision_model.layernorm_post.bias", SAME),
)

LOCAL_VISION_LAYER: tuple[Row, ...] = (
    ("attention_norm.weight", "input_layernorm.weight", SAME),
    ("attention_norm.bias", "input_layernorm.bias", SAME),
    ("attention.query.weight", "self_attn.q_proj.weight", HEADS),
    ("attention.key.weight", "self_attn.k_proj.weight", HEADS),
    ("attention.value.weight", "self_attn.v_proj.weight", HEADS),
    ("attention.output.weight", "self_attn.o_proj.weight", HEADS),
    ("mlp_norm.weight", "post_attention_layernorm.weight", SAME),
    ("mlp_norm.bias", "post_attention_layernorm.bias", SAME),
    ("mlp.up.weight", "mlp.fc1.weight", SAME),
    ("mlp.up.bias", "mlp.fc1.bias", SAME),
    ("mlp.down.weight", "mlp.fc2.weight", SAME),
    ("mlp.down.bias", "mlp.fc2.bias", SAME),
)

GLOBAL_VISION_LAYER: tuple[Row, ...] = (
    *LOCAL_VISION_LAYER,
    ("attention_gate", "gate_attn", SAME),
    ("mlp_gate", "gate_ffn", SAME),
)

SELF_LAYER: tuple[Row, ...] = (
    ("attention_norm.weight", "input_layernorm.weight", SAME),
    ("attention.query.weight", "self_attn.q_proj.weight", HEADS),
    ("attention.key.weight", "self_attn.k_proj.weight", HEADS),
    ("attention.value.weight", "self_attn.v_proj.weight", HEADS),
    ("attention.output.weight", "self_attn.o_proj.weight", HEADS),
    ("mlp_norm.weight", "post_attention_layernorm.weight", SAME),
    ("mlp.gate.weight", "mlp.gate_proj.weight", GATE_UP),
    ("mlp.up.weight", "mlp.up_proj.weight", GATE_UP),
    ("mlp.down.weight", "mlp.down_proj.weight", SAME),
)

CROSS_LAYER: tuple[Row, ...] = (
    ("attention_norm.weight", "input_layernorm.weight", SAME),
    ("attention.query.weight", "cross_attn.q_proj.weight", HEADS),
    ("attention.key.weight", "cross_attn.k_proj.weight", HEADS),
    ("attention.value.weight", "cross_attn.v_proj.weight", HEADS),
    ("attention.output.weight", "cross_attn.o_proj.weight", HEADS),
    ("attention.query_norm.weight", "cross_attn.q_norm.weight", SAME),
    ("attention.key_norm.weight", "cross_attn.k_norm.weight", SAME),
    ("attention_gate", "cross_attn_attn_gate", SAME),
    ("mlp_norm.weight", "post_attention_layernorm.weight", SAME),
    ("mlp.gate.weight", "mlp.gate_proj.weight", GATE_UP),
    ("mlp.up.weight", "mlp.up_proj.weight", GATE_UP),
    ("mlp.down.weight", "mlp.down_proj.weight", SAME),
    ("mlp_gate", "cross_attn_mlp_gate", SAME),
)


@dataclass(frozen=True)
class Section:
    """Rows that hold for each of some layers, numbered alike on both sides."""

    ours: str  #: prefix of our names
    theirs: str  #: prefix of the reference's
    rows: tuple[Row, ...]


def sections(sizes: ModelConfig) -> list[tuple[Section, Sequence[int | None]]]:
    """Every section, and the numbers its `*` takes for a model of these sizes."""
    vision, text = sizes.vision, sizes.text
    self_layers = [index for index in range(text.layers) if index not in text.cross_layers]
    tower, decoder = "vision_tower", "language_model.model.layers.*."
    return [
        (Section("", "", OUTSIDE_LAYERS), [None]),
        (
            Section(f"{tower}.local_layers.*.", "vision_model.transformer.layers.*.", LOCAL_VISION_LAYER),
            range(vision.local_layers),
        ),
        (
            Section(f"{tower}.global_layers.*.", "vision_model.global_transformer.layers.*.", GLOBAL_VISION_LAYER),
            range(vision.global_layers),
        ),
        (Section("layers.*.", decoder, SELF_LAYER), self_layers),
        (Section("layers.*.", decoder, CROSS_LAYER), text.cross_layers),
    ]


@dataclass(frozen=True)
class Part:
    """Rows of one of the reference's tensors that are one of ours."""

    ours: str  #: our parameter
    first_row: int  #: where it begins in the reference's tensor
    shape: Shape


@dataclass(frozen=True)
class ReferenceTensor:
    """A tensor of the reference, and ours that make it up, stacked along the first dimension (mostly one)."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]


def reference_tensors(model: VideoModel) -> dict[str, ReferenceTensor]:
    """The reference's name → its tensor, for every parameter of `model`, a whole one; on the meta device will do. A
    decision head is left out: the reference has none."""
    shapes = {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters() if not name.startswith(PREFIX)
    }
    parts: dict[str, list[Part]] = {}
    for section, numbers in sections(model.sizes):
        for number in numbers:
            for ours, theirs, _ in section.rows:
                name = f"{section.ours}{ours}".replace("*", str(number))
                above = parts.setdefault(f"{section.theirs}{theirs}".replace("*", str(number)), [])
                above.append(Part(name, sum(part.shape[0] for part in above), shapes.pop(name)))
    assert not shapes, f"the table lacks {sorted(shapes)}"  # a parameter was added to the model and not here
    return {name: ReferenceTensor(name, _stacked([part.shape for part in found]), tuple(found))
            for name, found in parts.items()}  # fmt: skip


def _stacked(shapes: Sequence[Shape]) -> Shape:
    return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])


def export_tensors(model: VideoModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights or gradients keyed by the parameter names of `model`, a whole one, under the reference's names; only the
    embedding is copied."""
    exported = {}
    for name, tensor in reference_tensors(model).items():
        found = [tensors[part.ours] for part in tensor.parts]
        exported[name] = found[0] if len(found) == 1 else torch.cat(found)
    return exported


def normalise_reference_name(name: str) -> str:
    """The name in the layout the reference saves (transformers 4.46), from that of any transformers version.

    From 4.52 on models have `model.` before the parts and keep `lm_head` outside of them.
    """
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = re.sub(r"^model\.(?=(vision_model|language_model|multi_modal_projector)\.)", "", name)
    return re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
