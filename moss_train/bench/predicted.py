"""Bytes that one process sends in one training step, by kind, from sizes alone: the formula that `traffic` is held to.

Notation: H decoder width; T tokens of a row, padded to a multiple of the tensor ranks under sequence parallelism; R rows;
K trained labels; n frames of this process's frame-parallel part; P vision tokens of a frame; A query heads and D their
width; e bytes of an activation. `ring_bytes` of `traffic` turns tensor sizes into bytes sent.

Per microbatch:

| kind | what is sent |
| --- | --- |
| tensor | T·R·H·e per crossing of the tensor-parallel boundary. Column layers: one all-reduce each in the backward pass; row layers and the embedding: one in the forward pass. Sequence parallel: column layers all-gather forward, all-gather again (if trained) and reduce-scatter backward; row layers reduce-scatter forward, all-gather backward; the embedding's all-reduce stays, and its gradient is all-gathered, and so are the decision head's T·R float32. The head: one all-reduce of K·H·e in the backward pass; sequence parallel: an all-gather forward and a reduce-scatter backward of T·R·H·e |
| loss | all-reduces of K float32: three of the cross-entropy, three of the decisions |
| frames | all-gather over tensor ranks, first stage, of (tensor ranks × the most frames one of them brings) · P·H·e; its reduce-scatter backward if the encoder is trained; with `model_parallel` sharding and a pipeline, one send of a later stage's own frames to the first, and of their gradients back |
| cross_attention | per cross layer, with cp: all-gather of cp · T·R·A/tp float32, all-reduce of T·R·A/tp·D float32; backward one such all-reduce |
| pipeline | one message per chunk boundary and direction: the longest of the step's T·R + n·P vectors (T of one tensor rank) of H·e |

Per step:

| kind | what is sent |
| --- | --- |
| data | every gradient buffer in float32 over data × frame ranks: all-reduce, or with zero=1 reduce-scatter, and all-gather of the weights; buffers are then padded |
| shared_gradients | all-reduces over tensor ranks of what each applied to its part (norms of heads; under sequence parallelism norms and gates), and of the encoder's buffer over all that encode |
| control | Z and other totals, the loss's statistics, the gradient norm: a few numbers |

Layers that are recomputed in full repeat their forward pass's traffic; torch stops recomputing once the last tensor that
the backward pass needs is there, which leaves out the last row layer of a self layer.
"""  # noqa: E501

import collections
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from moss_train.bench.traffic import ring_bytes
from moss_train.data.batch import FrameShare
from moss_train.model.config import ModelConfig, RecomputeConfig
from moss_train.model.parts import ModelPart, part_of
from moss_train.objectives.figures import statistics_size
from moss_train.objectives.labels import Total
from moss_train.parallel.config import LayoutConfig

_FP32, _FP64 = 4, 8
_SELF_COLUMNS, _CROSS_COLUMNS, _ROWS = 5, 3, 2  #: query, key, value, gate, up; a cross layer's keys read frames
_FEED_FORWARD_COLUMNS = 2
_ENCODER = -1  #: stands for the encoder where chunks are numbered
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128  #: elements; of megatron's distributed optimizer


@dataclass(frozen=True)
class Microbatch:
    """What of one microbatch's shape traffic depends on."""

    rows: int
    tokens: int  #: of the longest row
    frames: int  #: of all rows, on whichever process
    labels: int  #: trained ones


@dataclass(frozen=True)
class Parameter:
    """One parameter as a process holds it."""

    chunk: int  #: virtual chunk, or -1 for the encoder
    group: str  #: of `model.groups`
    size: int  #: elements here
    shared: bool = False  #: whole on every tensor rank, applied to a part


def predicted_bytes(
    model: ModelConfig,
    layout: LayoutConfig,
    ranks: int,
    rank: int,
    microbatches: Sequence[Microbatch],
    trained: Collection[str],
    recompute: RecomputeConfig | None = None,
    element_size: int = _FP32,
) -> dict[str, float]:
    """Bytes by `<kind>.<operation>` that process `rank` of `ranks` sends in one training step; kinds without any are
    left out.

    microbatches: those of this process's data rank. trained: parameter groups, each trained as a whole.
    element_size: of weights and activations; gradients are summed in float32.
    """
    process = _Process(model, layout, ranks, rank, frozenset(trained), recompute or RecomputeConfig(), element_size)
    for microbatch in microbatches:
        process.run(microbatch)
    process.pipeline(microbatches)
    process.gradients()
    process.control()
    return {key: size for key, size in process.bytes.items() if size}


class _Process:
    """Adds up what one process sends."""

    def __init__(self, model, layout, ranks, rank, trained, recompute, element_size):
        self.model, self.layout, self.trained, self.recompute = model, layout, trained, recompute
        self.element_size = element_size
        self.tensor_rank = rank % layout.tp
        self.frame_rank = rank // layout.tp % layout.cp
        self.data_ranks = ranks // (layout.tp * layout.cp * layout.pp)
        self.stage = rank // (layout.tp * layout.cp * self.data_ranks)
        self.part: ModelPart = part_of(model, layout, self.stage)
        self.encoder_trained = bool(trained & {"vision_tower", "projector"})
        self.bytes: collections.defaultdict[str, float] = collections.defaultdict(float)

    def add(self, kind: str, operation: str, size: float, ranks: int, times: int = 1) -> None:
        self.bytes[f"{kind}.{operation}"] += times * ring_bytes(operation, size, ranks)

    # What depends on a microbatch.

    def run(self, microbatch: Microbatch) -> None:
        """Forward and backward pass of everything held here but the sends between chunks."""
        if microbatch.frames:
            self.gather_frames(microbatch)
        for virtual, (first, end) in enumerate(self.part.chunks):
            carries_gradient = True  # a message does in any case
            if self.part.embedding and virtual == 0:
                carries_gradient = self.embed(microbatch)
            for index in range(first, end):
                layer = self.cross_layer if index in self.model.text.cross_layers else self.self_layer
                carries_gradient = layer(microbatch, carries_gradient)
            if self.part.head and virtual == len(self.part.chunks) - 1:
                self.head(microbatch, carries_gradient)

    def embed(self, microbatch: Microbatch) -> bool:
        carries_gradient = bool(self.trained & {"embedding", "anchor_embedding"})
        self.hidden("all_reduce", microbatch)
        if self.layout.sp and carries_gradient:
            self.hidden("all_gather", microbatch)
        return carries_gradient

    def self_layer(self, microbatch: Microbatch, carries_gradient: bool) -> bool:
        trained = "self_layers" in self.trained
        carries_gradient |= trained
        self.forward(microbatch, _SELF_COLUMNS, _ROWS)
        if carries_gradient:
            self.backward(microbatch, _SELF_COLUMNS, _ROWS, trained)
            if self.recompute.self_layers == "full":
                self.forward(microbatch, _SELF_COLUMNS, _ROWS - 1)
        return carries_gradient

    def cross_layer(self, microbatch: Microbatch, carries_gradient: bool) -> bool:
        trained = "cross_layers" in self.trained
        queries_do = carries_gradient or trained
        if not microbatch.frames:
            return queries_do
        # Without a trained query, what follows the attending still carries the features' gradient.
        after = queries_do or self.features_carry_gradient()
        self.forward(microbatch, _CROSS_COLUMNS, _ROWS)
        self.merge_frames(microbatch, backward=False)
        if after:
            queries = _CROSS_COLUMNS - _FEED_FORWARD_COLUMNS if queries_do else 0
            self.backward(microbatch, _FEED_FORWARD_COLUMNS + queries, _ROWS, trained)
            self.merge_frames(microbatch, backward=True)
            if self.recompute.cross_layers == "full":
                self.forward(microbatch, _CROSS_COLUMNS, _ROWS)
            if self.recompute.cross_layers != "none":
                self.merge_frames(microbatch, backward=False)
        return after

    def head(self, microbatch: Microbatch, carries_gradient: bool) -> None:
        carries_gradient |= "final_norm" in self.trained
        if self.layout.sp:
            self.hidden("all_gather", microbatch)
            if carries_gradient:
                self.hidden("reduce_scatter", microbatch)
        elif carries_gradient:
            size = microbatch.labels * self.model.text.hidden_size * self.element_size
            self.add("tensor", "all_reduce", size, self.layout.tp)
        if self.model.decision_head and self.layout.sp:
            self.add("tensor", "all_gather", self.tokens(microbatch) * _FP32, self.layout.tp)
        self.add("loss", "all_reduce", microbatch.labels * _FP32, self.layout.tp, times=6)

    def forward(self, microbatch: Microbatch, columns: int, rows: int) -> None:
        """Column and row layers on the hidden state."""
        if self.layout.sp:
            self.hidden("all_gather", microbatch, columns)
            self.hidden("reduce_scatter", microbatch, rows)
        else:
            self.hidden("all_reduce", microbatch, rows)

    def backward(self, microbatch: Microbatch, columns: int, rows: int, trained: bool) -> None:
        """The same layers on the way back. A trained column layer's weight needs its whole input once more."""
        if self.layout.sp:
            self.hidden("all_gather", microbatch, rows + (columns if trained else 0))
            self.hidden("reduce_scatter", microbatch, columns)
        else:
            self.hidden("all_reduce", microbatch, columns)

    def hidden(self, operation: str, microbatch: Microbatch, times: int = 1) -> None:
        size = self.tokens(microbatch) * self.model.text.hidden_size * self.element_size
        self.add("tensor", operation, size, self.layout.tp, times)

    def merge_frames(self, microbatch: Microbatch, backward: bool) -> None:
        """Partial attention over each process's frames made whole."""
        text, ranks = self.model.text, self.layout.cp
        per_token = text.attention_heads // self.layout.tp * _FP32
        if not backward:
            self.add("cross_attention", "all_gather", ranks * self.tokens(microbatch) * per_token, ranks)
        head_width = text.hidden_size // text.attention_heads
        self.add("cross_attention", "all_reduce", self.tokens(microbatch) * per_token * head_width, ranks)

    def gather_frames(self, microbatch: Microbatch) -> None:
        """Features to the processes that attend to them, and their gradients back."""
        counts = self.frame_counts(microbatch)
        frame = self.model.tokens_per_frame * self.model.text.hidden_size * self.element_size
        if self.part.embedding and any(map(sum, counts)):
            most = max(sum(stage[rank] for stage in counts) for rank in range(self.layout.tp))
            for operation in ("all_gather", "reduce_scatter")[: 2 if self.encoder_trained else 1]:
                self.add("frames", operation, self.layout.tp * most * frame, self.layout.tp)
        own = [stage[self.tensor_rank] for stage in counts]
        if self.stage and len(counts) > 1:
            self.add("frames", "send", own[self.stage] * frame, 2)
        elif self.encoder_trained:
            self.add("frames", "send", sum(own[1:]) * frame, 2)

    def frame_counts(self, microbatch: Microbatch) -> list[list[int]]:
        """Frames of this process's part by stage that encodes (one without `model_parallel`) and tensor rank."""
        bounds = FrameShare(None, self.layout.share_ranks).bounds(microbatch.frames)
        per_part = self.layout.share_ranks // self.layout.cp
        shares = range(self.frame_rank * per_part, (self.frame_rank + 1) * per_part)
        sizes = [bounds[share + 1] - bounds[share] for share in shares]
        return [sizes[start : start + self.layout.tp] for start in range(0, per_part, self.layout.tp)]

    def features_carry_gradient(self) -> bool:
        """On later stages they came in a message."""
        return self.encoder_trained or self.stage > 0

    def tokens(self, microbatch: Microbatch) -> int:
        """T · R."""
        multiple = self.layout.tp if self.layout.sp else 1
        return math.ceil(microbatch.tokens / multiple) * multiple * microbatch.rows

    # What is sent once a step.

    def pipeline(self, microbatches: Sequence[Microbatch]) -> None:
        layout = self.layout
        if layout.pp == 1:
            return
        ranks = layout.tp if layout.sp else 1
        length = max(
            self.tokens(one) // ranks + sum(map(sum, self.frame_counts(one))) * self.model.tokens_per_frame
            for one in microbatches
        )
        numbers = [virtual * layout.pp + self.stage for virtual in range(layout.vpp)]
        boundaries = sum(number < layout.chunks - 1 for number in numbers) + sum(number > 0 for number in numbers)
        size = length * self.model.text.hidden_size * self.element_size
        self.add("pipeline", "send", size, 2, times=boundaries * len(microbatches))

    def gradients(self) -> None:
        layout, copies = self.layout, self.data_ranks * self.layout.cp
        held = [one for one in held_parameters(self.model, self.part, layout) if one.group in self.trained]
        for chunk in sorted({one.chunk for one in held}):
            sizes = [one.size for one in held if one.chunk == chunk]
            elements = sum(sizes)
            if layout.zero:
                aligned = sum(_padded(size, _PARAMETER_ALIGNMENT) for size in sizes)
                elements = _padded(aligned, math.lcm(copies, _BUCKET_ALIGNMENT))
                self.add("data", "reduce_scatter", elements * _FP32, copies)
                self.add("data", "all_gather", elements * self.element_size, copies)
            else:
                self.add("data", "all_reduce", elements * _FP32, copies)
            if chunk == _ENCODER:
                encoders = layout.tp * (layout.pp if layout.sharding == "model_parallel" else 1)
                self.add("shared_gradients", "all_reduce", elements * _FP32, encoders)
        self.add("shared_gradients", "all_reduce", sum(one.size for one in held if one.shared) * _FP32, layout.tp)

    def control(self) -> None:
        layout = self.layout
        statistics = statistics_size() * _FP64
        self.add("control", "all_reduce", len(Total) * _FP64 + statistics, self.data_ranks)
        self.add("control", "all_reduce", statistics, layout.pp)
        of_one_copy = layout.tp * layout.pp
        self.add("control", "all_reduce", _FP32, of_one_copy * (self.data_ranks * layout.cp if layout.zero else 1))


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model."""
    alone = LayoutConfig()
    return sum(one.size for one in held_parameters(model, part_of(model, alone, 0), alone))


def held_parameters(model: ModelConfig, part: ModelPart, layout: LayoutConfig) -> Iterator[Parameter]:
    """Every parameter of what a process of `layout` holds of the model."""
    text, tp, sp = model.text, layout.tp, layout.sp
    width, head = text.hidden_size, text.hidden_size // text.attention_heads
    if part.encoder:
        yield from (Parameter(_ENCODER, "vision_tower", size) for size in _tower_sizes(model))
        yield from (Parameter(_ENCODER, "projector", size) for size in (model.vision.feature_size * width, width))
    if part.embedding:
        yield Parameter(0, "embedding", text.vocabulary_size // tp * width)
        yield Parameter(0, "anchor_embedding", text.extra_embedding_rows * width)
    matrices = [width * width // tp] * 2 + [width * head * text.key_value_heads // tp] * 2
    matrices += [width * text.mlp_size // tp] * 3
    for chunk, (first, end) in enumerate(part.chunks):
        for index in range(first, end):
            is_cross = index in text.cross_layers
            group = "cross_layers" if is_cross else "self_layers"
            yield from (Parameter(chunk, group, size) for size in matrices)
            yield from (Parameter(chunk, group, width, shared=sp) for _ in range(2))
            if is_cross:
                yield from (Parameter(chunk, group, head, shared=True) for _ in range(2))
                yield from (Parameter(chunk, group, 1, shared=sp) for _ in range(2))
    if part.head:
        last = len(part.chunks) - 1
        yield Parameter(last, "final_norm", width, shared=sp)
        yield Parameter(last, "head", text.vocabulary_size // tp * width)
        if model.decision_head:
            yield from (Parameter(last, "decision_head", size, shared=sp) for size in (width, 1))


def _tower_sizes(model: ModelConfig) -> list[int]:
    vision = model.vision
    width, tokens, ids = vision.hidden_size, vision.patches + 1, vision.aspect_ratios + 1
    sizes = [3 * vision.patch_size**2 * width, width]
    sizes += [tokens * width, ids * vision.max_tiles * tokens * width, 1]
    sizes += [ids * vision.max_tiles * width, 1] * 2
    sizes += [width] * 4
    layer = (
        [width] * 4 + [width * width] * 4 + [width * vision.mlp_size, vision.mlp_size, vision.mlp_size * width, width]
    )
    return sizes + layer * (vision.local_layers + vision.global_layers) + [1] * 2 * vision.global_layers


def _padded(elements: int, multiple: int) -> int:
    return math.ceil(elements / multiple) * multiple
