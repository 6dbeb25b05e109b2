"""Our side of `bench stream`: the cross-attention model on its caches, with random weights.

Shape suffixes: N frames, P vision tokens of a frame, H width.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from moss_train.evaluate.feeding import Waiting, feed
from moss_train.model.config import ModelConfig, TextConfig, VisionConfig
from moss_train.model.streaming import StreamState
from moss_train.model.video_model import VideoModel
from moss_train.streams.sight import Sight


def model_config(sizes: Any) -> ModelConfig:
    """The sizes of `bench.stream.StreamOptions` as a model's."""
    return ModelConfig(
        name="bench stream",
        vision=VisionConfig(
            hidden_size=sizes.tower_hidden,
            local_layers=sizes.tower_layers,
            global_layers=1,
            attention_heads=max(1, sizes.tower_hidden // 64),
            mlp_size=4 * sizes.tower_hidden,
            image_size=sizes.image_size,
            intermediate_layers=[0],
        ),
        text=TextConfig(
            vocabulary_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            layers=sizes.layers,
            cross_layers=list(sizes.cross_layers),
            attention_heads=sizes.heads,
            key_value_heads=sizes.key_value_heads,
            mlp_size=sizes.mlp,
            rope_scaling=None,
        ),
        initial_gate=0.5,
    )


class Stream(NamedTuple):
    """A stream that was put aside."""

    state: StreamState
    sight: Sight
    tokens: int
    frames: int
    token: int


class CrossAttending:
    """One stream."""

    def __init__(self, sizes: Any, group: Any, device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.model = VideoModel(model_config(sizes), group, dtype).to(device).eval()
        self._sizes, self._device, self._dtype = sizes, device, dtype
        self._anchor = sizes.vocabulary
        self._random = torch.Generator().manual_seed(1)
        self.start()

    @property
    def parameters(self) -> int:
        """Of the decoder's layers, without embedding and head."""
        return sum(parameter.numel() for parameter in self.model.layers.parameters())

    def start(self, sight: Sight | None = None) -> None:
        """An empty stream."""
        self._sight = sight or Sight()
        self._state = self.model.start_streams(1, sight=self._sight)
        self._tokens = self._frames = 0
        self._token = 1

    def features(self, frames: int) -> torch.Tensor:
        """What tower and projector would have left, [N, P, H]."""
        shape = (frames, self.model.sizes.tokens_per_frame, self._sizes.hidden)
        return (torch.randn(shape, generator=self._random) * 0.02).to(self._device, self._dtype)

    def prompt(self, frames: int) -> tuple[list[int], torch.Tensor]:
        """An offline prompt with so many frames in it, and their features; made outside the timer."""
        ids = [*self._words(self._sizes.prompt_before), *[self._anchor] * frames, *self._words(self._sizes.question)]
        return ids, self.features(frames)

    def cold(self, prompt: tuple[list[int], torch.Tensor]) -> None:
        """Keys and values of all frames, prefill and the first token."""
        self.start(self._sight)
        ids, features_NPH = prompt
        self._add(features_NPH, ids)
        self._feed(ids)

    def decode(self, tokens: int) -> None:
        """Greedy tokens, one by one."""
        for _ in range(tokens):
            self._feed([self._token])

    def question(self) -> None:
        """A question in the middle of the stream: its first token."""
        self._feed(self._words(self._sizes.question))

    def frame(self, features_1PH: torch.Tensor) -> None:
        """A frame arrives while nothing is said: the silence before it, its anchor, the decision."""
        ids = [2, self._anchor]
        self._add(features_1PH, ids)
        self._feed(ids)

    def skip_to(self, frames: int) -> None:
        """As if so many silent frames had gone by, fed in long pieces."""
        while self._frames < frames:
            count = min(64, frames - self._frames)
            ids = [2, self._anchor] * count
            self._add(self.features(count), ids)
            self._feed(ids)

    def fill(self, frames: int) -> None:
        """Caches as large as if so many silent frames had gone by since the stream's start, at less cost: their tokens
        see no frame, since none is an anchor."""
        for begin in range(0, frames, 64):
            ids = [2, self._anchor] * min(64, frames - begin)
            self._add(self.features(len(ids) // 2), ids)
            self._feed([2] * len(ids))
        self._frames = frames
        self._feed([2])

    def watch(self, frames: int) -> None:
        """So many silent frames, each by itself."""
        features_1PH = self.features(1)
        for _ in range(frames):
            self.frame(features_1PH)

    def put_aside(self) -> "Stream":
        """The stream as it stands; `take_up` goes on with it."""
        return Stream(self._state, self._sight, self._tokens, self._frames, self._token)

    def take_up(self, stream: "Stream") -> None:
        """Go on with a stream that was put aside."""
        self._state, self._sight, self._tokens, self._frames, self._token = stream

    def frame_seconds(self, streams: Sequence["Stream"], frames: int) -> list[float]:
        """Median seconds of one of the next frames of each stream, in turns, so that a busy moment meets all alike."""
        features_1PH, seconds = self.features(1), [[] for _ in streams]
        streams = list(streams)
        for _ in range(frames):
            for number, stream in enumerate(streams):
                self.take_up(stream)
                self.synchronise()
                began = time.perf_counter()
                self.frame(features_1PH)
                self.synchronise()
                seconds[number].append(time.perf_counter() - began)
                streams[number] = self.put_aside()
        return [statistics.median(of_stream) for of_stream in seconds]

    def tower_seconds(self, frames: int) -> float:
        """Seconds for the tower and the projector of so many frames."""
        size = self._sizes.image_size
        pictures = torch.randint(0, 256, (frames, 3, size, size), dtype=torch.uint8).to(self._device)
        began = time.perf_counter()
        self._state.encode(pictures)
        self.synchronise()
        return time.perf_counter() - began

    @property
    def cache_bytes(self) -> int:
        return self._state.cache_bytes()

    def synchronise(self) -> None:
        """Wait for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _words(self, count: int) -> list[int]:
        return torch.randint(3, self._sizes.vocabulary, (count,), generator=self._random).tolist()

    def _add(self, features_NPH: torch.Tensor, ids: list[int]) -> None:
        places = self._sight.places(np.array(ids) == self._anchor, self._tokens, self._frames)
        positions = torch.from_numpy(places.frame_positions.astype(np.int64))
        self._state.add_features(features_NPH, torch.zeros(len(positions), dtype=torch.long), positions)

    def _feed(self, ids: list[int]) -> None:
        """As evaluation and live sessions feed."""
        frames = self._frames + ids.count(self._anchor)
        waiting = {0: Waiting(ids, self._tokens, frames)}
        logits_1V = feed(self.model, self._state, self._sight, self._anchor, waiting, 1, self._device)
        self._tokens, self._frames = self._tokens + len(ids), frames
        self._token = int(logits_1V.argmax(-1))
