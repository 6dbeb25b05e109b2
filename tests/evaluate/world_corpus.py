"""A corpus in memory: the built-in world's streams, drawn, not encoded."""

import numpy as np
import torch

from moss_train.data.synthetic.world import sample_clip
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import parse_sample


class WorldCorpus:
    """`streams` held-out streams of the world at `size` pixels; every fourth key is a conversation, to be left out."""

    def __init__(self, streams: int, size: int, split: str = "heldout"):
        self._size = size
        self._clips = {}
        for index in range(streams):
            key = f"{split}-{index:04d}"
            self._clips[key] = sample_clip(np.random.default_rng([7, index]), split, "stream", key)
            if index % 4 == 3:
                key = f"talk-{index:04d}"
                self._clips[key] = sample_clip(np.random.default_rng([8, index]), split, "conversation", key)
        self.keys = list(self._clips)

    def __len__(self):
        return len(self.keys)

    def key(self, number):
        return self.keys[number]

    def sample(self, number):
        key = self.keys[number]
        return parse_sample(self._clips[key].sample, key)

    def media_info(self, number):
        return {"v0": MediaInfo(self._clips[self.keys[number]].timeline.duration_s, 4.0, None)}

    def frames(self, number, requests):
        assert [request.time_s for request in requests] == list(range(len(requests)))
        frames_FHWC = self._clips[self.keys[number]].frames(1.0, self._size)
        return torch.from_numpy(np.ascontiguousarray(frames_FHWC.transpose(0, 3, 1, 2)))
