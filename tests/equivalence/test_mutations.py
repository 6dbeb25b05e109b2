"""The comparison finds what it is for: each of these faults, put into the ranks, must fail it where it bites."""

import dataclasses
import re
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.training import train_case
from moss_train.data.batch import Batch
from moss_train.engines import gradients, megatron, stages
from moss_train.model import frame_parallel
from moss_train.model.video_model import VideoModel
from moss_train.parallel import frame_gather
from moss_train.parallel.config import LayoutConfig


def side_channel_without_gradient():
    """Later stages use the features they receive, but send no gradient of them back."""
    received = stages.unpack_message

    def detached(*arguments):
        hidden, features = received(*arguments)
        return hidden, None if features is None else features.detach()

    return mock.patch.object(stages, "unpack_message", detached)


def partial_gradients_unsummed():
    """Norms of heads, and with sequence parallelism all norms and gates, keep one tensor rank's part."""
    return mock.patch.object(gradients, "sum_partial_gradients", lambda chunks, state: None)


def encoder_gradients_unsummed():
    return mock.patch.object(gradients, "sum_encoder_gradients", lambda encoder, state: None)


def normaliser_of_one_rank():
    """Z of the own microbatches instead of the global batch's."""

    def of_own(self, microbatches):
        return sum(self._objective.totals(batch) for batch in microbatches)

    return mock.patch.object(megatron.MegatronEngine, "_global_totals", of_own)


def frames_merged_unweighted():
    """Results over the parts of the frames are added as if each part had the whole softmax's weight."""
    original = frame_parallel._attend_held

    def flat(*arguments):
        mixed, log_sum = original(*arguments)
        return mixed, torch.where(log_sum.isinf(), log_sum, torch.zeros_like(log_sum))

    return mock.patch.object(frame_parallel, "_attend_held", flat)


def frame_gradients_unsummed():
    """The backward pass of shared frames uses this process's gradient of the result alone."""

    def all_reduce(tensor, group=None):
        if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
            dist.all_reduce(tensor, group=group)

    return mock.patch.object(frame_parallel, "dist", SimpleNamespace(all_gather=dist.all_gather, all_reduce=all_reduce))


def gathered_gradients_unsummed():
    """A frame's gradient is taken from the process that encoded it, not from all that attended to it."""

    def reduce_scatter(own, padded, group=None):
        own.copy_(padded.chunk(group.size())[group.rank()])

    fake = SimpleNamespace(**{name: getattr(dist, name) for name in ("all_gather_into_tensor",)})
    fake.reduce_scatter_tensor = reduce_scatter
    return mock.patch.object(frame_gather, "dist", fake)


def encoder_counted_on_every_stage():
    """The gradient norm counts the copies of the encoder."""
    original = megatron.MegatronEngine._wrap

    def wrap(self):
        original(self)
        for parameter in self._model.vision_tower.parameters():
            parameter.shared = False

    return mock.patch.object(megatron.MegatronEngine, "_wrap", wrap)


def tokens_of_the_first_rank():
    """With sequence parallelism every rank takes the first tokens' visibility for its own."""

    def first(self, x_TR1):
        return x_TR1.chunk(self.tensor_group.size())[0] if self.config.sequence_parallel else x_TR1

    return mock.patch.object(VideoModel, "_own_tokens", first)


def frames_in_another_order():
    """Every rank has as many frames as it should, but those before them."""
    original = Batch.share

    def share(self, share):
        return original(dataclasses.replace(self, frames_NCHW=self.frames_NCHW.roll(1, dims=0)), share)

    return mock.patch.object(Batch, "share", share)


def train_mutated(fault, rank, ranks, case, path):
    with fault():
        return train_case(rank, ranks, case, path)


SGD, CLIPPED = Problem(), Problem(clip=0.3)
TP, TP_SP, PP = LayoutConfig(tp=2), LayoutConfig(tp=2, sp=True), LayoutConfig(pp=2)
CP, DP = LayoutConfig(cp=2), LayoutConfig(dp=2)
ENCODER = r"vision_tower|projector"


@pytest.mark.parametrize(
    ("fault", "case", "found", "only"),
    [
        (side_channel_without_gradient, Case(SGD, PP), ["gradient of projector.weight"], ENCODER),
        (
            partial_gradients_unsummed,
            Case(SGD, TP),
            ["gradient of layers.1.attention.query_norm.weight", "gradient of layers.6.attention.key_norm.weight"],
            r"attention\.(query|key)_norm",
        ),
        (
            partial_gradients_unsummed,
            Case(SGD, TP_SP),
            ["gradient of layers.4.mlp_gate", "gradient of final_norm.weight", "gradient of layers.0.mlp_norm.weight"],
            r"norm|gate",
        ),
        (encoder_gradients_unsummed, Case(SGD, TP), ["gradient of vision_tower.norm_post.weight"], ENCODER),
        (encoder_gradients_unsummed, Case(SGD, PP), ["gradient of projector.bias"], ENCODER),
        (normaliser_of_one_rank, Case(SGD, DP), ["loss of step 0"], ""),
        (frames_merged_unweighted, Case(SGD, CP), ["loss of step 0"], ""),
        (frame_gradients_unsummed, Case(SGD, CP), ["gradient of layers.1.attention.key.weight"], ""),
        (gathered_gradients_unsummed, Case(SGD, TP), ["gradient of projector.weight"], ENCODER),
        (encoder_counted_on_every_stage, Case(CLIPPED, PP), ["gradient norm of step 0"], ""),
        (tokens_of_the_first_rank, Case(SGD, TP_SP), ["loss of step 0"], ""),
        (frames_in_another_order, Case(SGD, TP), ["loss of step 0"], ""),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault_is_found(comparer, fault, case, found, only):
    """`only`: what the gradients that are wrong have in their names. The others show that nothing else was."""
    failures = comparer.compare(case, partial(train_mutated, fault)).failures
    for beginning in found:
        assert any(failure.startswith(beginning) for failure in failures), failures[:5]
    wrong = [failure for failure in failures if failure.startswith("gradient of")]
    assert all(re.search(only, failure) for failure in wrong), wrong
