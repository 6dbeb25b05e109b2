"""What of the model one process holds: how the layers are cut into pipeline chunks."""

from collections.abc import Callable
from dataclasses import dataclass

from moss_train.model.config import ModelConfig
from moss_train.parallel.config import LayoutConfig

#: Text tokens per frame of the data that the balance of stages is computed for: the published real-time mixture's.
TOKENS_A_FRAME = 16


@dataclass(frozen=True)
class ModelPart:
    """Layers by chunk, and whether the parts before and after them are here."""

    encoder: bool  #: vision tower and projector
    embedding: bool
    chunks: tuple[tuple[int, int], ...]  #: of each chunk its first layer and the one after its last
    head: bool  #: final norm and head


def whole(config: ModelConfig) -> ModelPart:
    """Everything on one process."""
    return ModelPart(encoder=True, embedding=True, chunks=((0, config.text.layers),), head=True)


def part_of(config: ModelConfig, layout: LayoutConfig, pipeline_rank: int) -> ModelPart:
    """What stage `pipeline_rank` holds. Chunk v of stage p is number v · pp + p in the order they run; with DualPipeV
    its chunks are numbers p and 2 · pp − 1 − p."""
    ends = [0]
    for layers in split_layers(config, layout):
        ends.append(ends[-1] + layers)
    numbers = [number for number in range(layout.chunks) if stage_of_chunk(layout, number) == pipeline_rank]
    return ModelPart(
        encoder=pipeline_rank == 0 or layout.sharding == "model_parallel",
        embedding=pipeline_rank == 0,
        chunks=tuple((ends[number], ends[number + 1]) for number in numbers),
        head=pipeline_rank == layout.last_stage,
    )


def stage_of_chunk(layout: LayoutConfig, number: int) -> int:
    """The stage that holds chunk `number`, in the order in which they run."""
    if layout.dualpipev:
        return min(number, layout.chunks - 1 - number)
    return number % layout.pp


def split_layers(config: ModelConfig, layout: LayoutConfig) -> list[int]:
    """Layers of each chunk: as given, or such that the dearest chunk is as cheap as can be."""
    if layout.pipeline_split is not None:
        return list(layout.pipeline_split)
    costs = [_layer_cost(config, index, layout.cp) for index in range(config.text.layers)]
    first = _encoder_cost(config) / layout.cp if layout.sharding == "tp" and layout.pp > 1 else 0.0
    last = 2.0 * config.text.hidden_size * (config.text.vocabulary_size or 0)
    return _balanced(costs, layout.chunks, first, last)


def _layer_cost(config: ModelConfig, index: int, frame_ranks: int) -> float:
    """Floating-point operations of a layer's matrices for one text token."""
    text = config.text
    width, key_value = text.hidden_size, text.hidden_size * text.key_value_heads // text.attention_heads
    cost = 2 * width * width + 3 * width * text.mlp_size
    if index in text.cross_layers:
        cost += 2 * width * key_value * config.tokens_per_frame / TOKENS_A_FRAME / frame_ranks
    else:
        cost += 2 * width * key_value
    return 2.0 * cost


def _encoder_cost(config: ModelConfig) -> float:
    """Operations of tower and projector for one text token's share of the frames."""
    vision = config.vision
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.mlp_size
    tower = layer * (vision.local_layers + vision.global_layers) * (vision.patches + 1)
    projector = vision.feature_size * config.text.hidden_size * config.tokens_per_frame
    return 2.0 * (tower + projector) / TOKENS_A_FRAME


def _balanced(costs: list[float], chunks: int, first: float, last: float) -> list[int]:
    """Cut `costs` into `chunks` runs whose dearest is cheapest, `first` and `last` added to the outer ones; among such
    cuts, the one whose chunks differ least, so that processes with several chunks come out even too.

    Every chunk but the first, which may hold the encoder alone, gets a layer.
    """
    dearest, _ = _cut(costs, chunks, first, last, combine=max, limit=float("inf"))
    # A hair above the limit, because sums of floats differ with their order.
    _, sizes = _cut(costs, chunks, first, last, combine=lambda a, b: a + b * b, limit=dearest * (1 + 1e-9))
    return sizes


def _cut(
    costs: list[float],
    chunks: int,
    first: float,
    last: float,
    combine: Callable[[float, float], float],
    limit: float,
) -> tuple[float, list[int]]:
    """The smallest fold of the chunks' costs by `combine`, none above `limit`, and the chunk sizes that give it."""
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    layers = len(costs)
    # best[c][e]: smallest fold of the first c chunks when they end before layer e; cut[c][e]: where c begins then.
    best = [[float("inf")] * (layers + 1) for _ in range(chunks + 1)]
    cut = [[0] * (layers + 1) for _ in range(chunks + 1)]
    best[0][0] = 0.0
    for chunk in range(1, chunks + 1):
        extra = (first if chunk == 1 else 0.0) + (last if chunk == chunks else 0.0)
        least = 0 if chunk == 1 and first else 1
        for end in range(layers + 1):
            for start in range(end - least, -1, -1):
                cost = total[end] - total[start] + extra
                fold = combine(best[chunk - 1][start], cost)
                if cost <= limit and fold < best[chunk][end]:
                    best[chunk][end], cut[chunk][end] = fold, start
    sizes, end = [], layers
    for chunk in range(chunks, 0, -1):
        sizes.append(end - cut[chunk][end])
        end = cut[chunk][end]
    return best[chunks][layers], sizes[::-1]
