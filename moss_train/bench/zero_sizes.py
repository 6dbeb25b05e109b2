"""The sizes that DeepSpeed gets, made to fit a small model.

Buckets, prefetch and what ZeRO 3 leaves gathered are set in elements, with defaults for models of billions: a bucket of
50 million float32 numbers would be half the memory of a model with 100 million, and ZeRO 3 would never let go of a
weight. Scaled, they are to the model what the defaults are to the 11B.
"""

import math

_DEFAULTS = {
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}
#: Parameters below it are not sharded: meant to tell vectors from matrices.
_PERSISTENCE = "stage3_param_persistence_threshold"
_PERSISTENCE_DEFAULT = 100_000
_MODEL = 10_670_220_835  #: parameters of recipes/model/moss_video_11b.yaml


def scaled_sizes(parameters: int, zero: int) -> dict[str, dict[str, int]]:
    """Fields of `engine.deepspeed` for a model of so many parameters.

    Sizes go with the number of parameters; the one that is a single parameter's goes with its square root, as the width
    of a layer does. What ZeRO 3 alone reads is left out at other stages.
    """
    share = min(1.0, parameters / _MODEL)
    # DeepSpeed takes even buckets only.
    sizes = {name: 2 * math.ceil(size * share / 2) for name, size in _DEFAULTS.items()}
    sizes[_PERSISTENCE] = math.ceil(_PERSISTENCE_DEFAULT * math.sqrt(share))
    if zero < 3:
        sizes = {name: sizes[name] for name in ("reduce_bucket_size", "allgather_bucket_size")}
    return {"zero_optimization": sizes}
