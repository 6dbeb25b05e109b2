"""Incremental use of the model: streams that grow token by token and frame by frame, with cached keys and values.

A frame's keys and values depend on the frame and its position alone, so adding a frame costs one tower pass and
never touches what was computed before; only a window drops frames. Positions are never rewritten: what is left in the
caches is what training with the same window looked at (`frame_cache`, `text_cache`).

In a parallel layout every process of a model-parallel group makes the same calls with the same arguments and gets the
same logits: tensor-parallel processes hold their heads' caches and gather the vocabulary, pipeline stages hold their
layers' caches, the first stage encodes frames and sends the features to all. Frames are not shared over `cp`
processes, which all do the same. With sequence parallelism tokens are padded to a multiple of the processes.

Shape suffixes: R rows, N new frames, L new tokens, P vision tokens of a frame, A query heads, B key/value heads, D
head width, H decoder width, V rows of the head.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from moss_train.model.frame_cache import FrameCache, FramePlan, KeepAll, KeepPolicy, KeepWindow
from moss_train.model.layers import CrossLayer, LayerInputs
from moss_train.model.parts import stage_of_chunk
from moss_train.model.text_cache import TextCache, TextPlan
from moss_train.parallel.groups import ParallelState, state
from moss_train.streams.sight import Sight


class _CachedAttention:
    """The attention backend over the caches, for the tokens of one `extend` call."""

    def __init__(self, text: TextCache, text_plan: TextPlan, frames: FrameCache, frame_plan: FramePlan):
        self._text, self._text_plan = text, text_plan
        self._frames, self._frame_plan = frames, frame_plan

    def self_attention(self, layer, q_TRAD, k_TRBD, v_TRBD):
        heads = (x.transpose(0, 1) for x in (q_TRAD, k_TRBD, v_TRBD))
        return self._text.attend(layer, *heads, self._text_plan).flatten(2).transpose(0, 1)

    def cross_attention(self, layer, q_TRAD, k_NPBD, v_NPBD):
        return self._frames.attend(layer, q_TRAD.transpose(0, 1), self._frame_plan).transpose(0, 1)


class StreamState:
    """Caches of several streams. Use through `VideoModel.start_streams`, `add_frames` and `extend`."""

    def __init__(
        self,
        model,
        rows: int,
        max_tokens: int | None = None,
        max_frames: int | None = None,
        sight: Sight | None = None,
        keep: KeepPolicy | None = None,
        parallel: ParallelState | None = None,
    ):
        """`model`: what this process holds of it, all its chunks. `parallel`: the layout; null takes the groups that
        are built when the model is a pipeline stage.

        `sight`: with its windows the caches are rings of that size; no token may look further back. `keep`: other
        frames stay than those of `sight`. `max_tokens`, `max_frames`: most that a row takes in all; None: no bound.
        """
        self.model = model
        self._parallel = parallel or (None if model.is_whole else state())
        sizes, text = model.sizes, model.sizes.text
        #: of the tokens last fed, logits of "speak now", or with `only_last` of each row's last, [R, 1]; None without a
        #: decision head
        self.decisions_RL: torch.Tensor | None = None
        sight = sight or Sight()
        parameter = next(model.parameters(), None)
        self.device = state().device if parameter is None else parameter.device
        self._dtype = model.config.params_dtype
        like = torch.empty(0, dtype=self._dtype, device=self.device)
        self._tensor_ranks = model.tensor_group.size()
        self._heads = text.key_value_heads // self._tensor_ranks
        head_size = text.hidden_size // text.attention_heads
        keep = keep or (KeepAll() if sight.window is None else KeepWindow(sight.window, sight.sinks))
        cross = [layer.index for layer in model.decoder_layers if isinstance(layer, CrossLayer)]
        own = [layer.index for layer in model.decoder_layers if not isinstance(layer, CrossLayer)]
        self.frames = FrameCache(cross, rows, self._heads, sizes.tokens_per_frame, head_size, keep, max_frames, like)
        self.text = TextCache(own, rows, self._heads, head_size, sight.text_window, sight.text_sinks, max_tokens, like)

    @property
    def tokens_R(self) -> np.ndarray:
        """Tokens fed to each row so far."""
        return self.text.tokens_R

    @property
    def frames_R(self) -> np.ndarray:
        """Frames added to each row so far."""
        return self.frames.frames_R

    def cache_bytes(self) -> int:
        """Bytes of this process's caches as they are allocated."""
        caches = [*self.frames.of_layer.values(), *self.text.of_layer.values()]
        return sum(x.numel() * x.element_size() for pair in caches for x in pair)

    @torch.inference_mode()
    def encode(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Features [N, P, H] of frames, uint8 [N, C, H, W], for `add_features`; the caches are not touched, so it may
        run while `extend` does. Tensor-parallel processes share the frames."""
        frames_NCHW = frames_NCHW.to(self.device)
        sizes = self.model.sizes
        shape = (len(frames_NCHW), sizes.tokens_per_frame, sizes.text.hidden_size)
        if self._encodes():
            features = self._encode_shared(frames_NCHW, shape)
        else:
            features = torch.empty(shape, dtype=self._dtype, device=self.device)
        return self._from_stage(0, features)

    def _encodes(self) -> bool:
        return self._parallel is None or self._parallel.pipeline_rank == 0

    def _encode_shared(self, frames_NCHW: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        if self._tensor_ranks == 1 or len(frames_NCHW) == 1:
            return self.model.encode_frames(frames_NCHW)
        share = -(-len(frames_NCHW) // self._tensor_ranks)
        mine = frames_NCHW[self.model.tensor_group.rank() * share :][:share]
        own = torch.zeros(share, *shape[1:], dtype=self._dtype, device=self.device)
        if len(mine):
            own[: len(mine)] = self.model.encode_frames(mine)
        everyone = own.new_empty(share * self._tensor_ranks, *shape[1:])
        dist.all_gather_into_tensor(everyone, own, group=self.model.tensor_group)
        return everyone[: len(frames_NCHW)]

    @torch.inference_mode()
    def add_features(self, features_NPH: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> None:
        """Append encoded frame n to row `rows_N[n]` at rotary position `positions_N[n]`, in the order given.

        Raises ValueError when a row would hold more than `max_frames` frames.
        """
        if not len(features_NPH):
            return
        rotation = self.model.frame_rotation(positions_N.to(self.device))
        of_layer = {}
        for layer in self.model.decoder_layers:
            if isinstance(layer, CrossLayer):
                both = layer.attention.keys_values(features_NPH, rotation)
                of_layer[layer.index] = tuple(x.transpose(1, 2) for x in both)
        self.frames.stage(rows_N.tolist(), of_layer)

    @torch.inference_mode()
    def add_frames(self, frames_NCHW: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> None:
        """Encode frames and append them, as `add_features` does."""
        if len(frames_NCHW):
            self.add_features(self.encode(frames_NCHW), rows_N, positions_N)

    @torch.inference_mode()
    def extend(
        self,
        ids_RL,
        positions_RL,
        lengths_R,
        visible_lo_RL=None,
        visible_hi_RL=None,
        sinks: int = 0,
        cross_positions_RL=None,
        text_lo_RL=None,
        text_sinks: int = 0,
        only_last: bool = False,
    ):
        """Append `lengths_R[r]` (0 allowed) of the tokens `ids_RL[r]`; logits [R, L, V], or with `only_last` those of
        each row's last token, [R, V].

        A token sees frames `[visible_lo, visible_hi)` and, below `visible_hi`, the first `sinks` frames;
        by default every frame added so far; and tokens from `text_lo` on, and the first `text_sinks`, by default all.
        `cross_positions` are those among the frames, by default `positions`. Ranges and lengths are read on the host:
        give them as tensors of the CPU. Raises ValueError when a row would exceed `max_tokens`, or a token looks at
        what left the caches.
        """
        asked = ids_RL.shape[1]
        if self.model.config.sequence_parallel:
            pad = -asked % self._tensor_ranks
            ids_RL, positions_RL, cross_positions_RL, text_lo_RL, visible_lo_RL, visible_hi_RL = (
                None if x is None else F.pad(x, (0, pad))
                for x in (ids_RL, positions_RL, cross_positions_RL, text_lo_RL, visible_lo_RL, visible_hi_RL)
            )
        ids_RL, positions_RL = ids_RL.to(self.device), positions_RL.to(self.device)
        lengths_R, new_tokens = _host(lengths_R), ids_RL.shape[1]
        hi_RL = np.repeat(self.frames_R[:, None], new_tokens, 1) if visible_hi_RL is None else _host(visible_hi_RL)
        lo_RL = np.zeros_like(hi_RL) if visible_lo_RL is None else _host(visible_lo_RL)
        text_lo_RL = None if text_lo_RL is None else _host(text_lo_RL)
        any_frame = bool(self.frames_R.any())
        # The text first: it refuses without having changed anything.
        text_plan = self.text.plan(lengths_R, text_lo_RL, text_sinks, new_tokens)
        frame_plan = self.frames.plan(lengths_R, lo_RL, hi_RL, sinks)
        cross_RL = positions_RL if cross_positions_RL is None else cross_positions_RL.to(self.device)
        sees_TR1 = torch.from_numpy(frame_plan.sees_RL.T[..., None]).to(self.device) if any_frame else None
        inputs = LayerInputs(
            backend=_CachedAttention(self.text, text_plan, self.frames, frame_plan),
            text_rotation=self.model.text_rotation(positions_RL.T),
            cross_rotation=self.model.text_rotation(cross_RL.T),
            frame_rotation=self.model.frame_rotation(positions_RL[:, :0]),
            features_NPH=None,
            sees_frames_TR1=sees_TR1 if sees_TR1 is None else self._own_tokens(sees_TR1),
        )
        last_R = torch.from_numpy(np.maximum(lengths_R - 1, 0)).to(self.device) if only_last else None
        x_TRH = self._run(ids_RL, inputs)
        logits_LRV, decisions_LR = self._read_out(x_TRH, last_R, ids_RL.shape)
        self.decisions_RL = None if decisions_LR is None else decisions_LR[:asked].T
        self.text.tokens_R = self.text.tokens_R + lengths_R
        return logits_LRV[0] if only_last else logits_LRV[:asked].transpose(0, 1)

    def _run(self, ids_RL: torch.Tensor, inputs: LayerInputs) -> torch.Tensor | None:
        """Hidden states after the last layer, where that is held; [T, R, H], with sequence parallelism this process's
        share of the tokens."""
        model = self.model
        x_TRH, mine = None, iter(model.part.chunks)
        for number in range(self._chunks):
            if not self._is_here(number):
                continue
            if number == 0:
                x_TRH = model.embedding(ids_RL.T)
            elif not self._is_here(number - 1):
                x_TRH = self._receive(number - 1, ids_RL.shape)
            for index in range(*next(mine)):
                x_TRH = model.layers[str(index)](x_TRH, inputs, model.recompute)
            if number + 1 < self._chunks and not self._is_here(number + 1):
                dist.send(x_TRH.contiguous(), self._rank_of(number + 1), self._parallel.pipeline_group)
        return x_TRH if model.part.head else None

    def _read_out(
        self, x_TRH: torch.Tensor | None, last_R: torch.Tensor | None, shape: torch.Size
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the heads say of all tokens, or of the last of each row as [1, R, …], on every process."""
        model, split = self.model, self.model.config.sequence_parallel
        rows, tokens = shape
        if x_TRH is None:
            out = (tokens if last_R is None else 1, rows)
            logits = torch.empty(*out, model.sizes.text.vocabulary_size, dtype=self._dtype, device=self.device)
            decisions = torch.empty(*out, device=self.device) if model.sizes.decision_head else None
        else:
            if last_R is not None:
                if split:
                    x_TRH = _gathered(x_TRH, 0, model.tensor_group)
                x_TRH = x_TRH[last_R, torch.arange(rows, device=self.device)][None]
            said = model.read_out(x_TRH)
            logits, decisions = _gathered(said.logits_TRV, -1, model.tensor_group), said.decisions_TR
            if last_R is not None and split:
                # With sequence parallelism the heads take a share of the tokens and join the shares.
                logits, decisions = logits[:1], None if decisions is None else decisions[:1]
        stage = 0 if self._parallel is None else self._parallel.layout.last_stage
        return self._from_stage(stage, logits), None if decisions is None else self._from_stage(stage, decisions)

    def _own_tokens(self, x_TR1: torch.Tensor) -> torch.Tensor:
        if not self.model.config.sequence_parallel:
            return x_TR1
        return x_TR1.chunk(self._tensor_ranks)[self.model.tensor_group.rank()]

    # Pipeline stages. Chunks are numbered in the order in which they run.

    @property
    def _chunks(self) -> int:
        return 1 if self._parallel is None else self._parallel.layout.chunks

    def _is_here(self, number: int) -> bool:
        if self._parallel is None:
            return True
        return stage_of_chunk(self._parallel.layout, number) == self._parallel.pipeline_rank

    def _rank_of(self, number: int) -> int:
        return dist.get_global_rank(self._parallel.pipeline_group, stage_of_chunk(self._parallel.layout, number))

    def _receive(self, number: int, shape: torch.Size) -> torch.Tensor:
        rows, tokens = shape
        tokens = tokens // self._tensor_ranks if self.model.config.sequence_parallel else tokens
        x_TRH = torch.empty(tokens, rows, self.model.sizes.text.hidden_size, dtype=self._dtype, device=self.device)
        dist.recv(x_TRH, self._rank_of(number), self._parallel.pipeline_group)
        return x_TRH

    def _from_stage(self, stage: int, x: torch.Tensor) -> torch.Tensor:
        """What `stage` holds, on every stage; `x` is that, or room for it."""
        if self._parallel is None or self._parallel.pipeline_ranks == 1:
            return x
        x = x.contiguous()
        dist.broadcast(x, dist.get_global_rank(self._parallel.pipeline_group, stage), self._parallel.pipeline_group)
        return x


def _host(x: torch.Tensor | Sequence[int]) -> np.ndarray:
    return (x.cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)).astype(np.int64)


def _gathered(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The parts of all processes of `group` joined along `dim`."""
    if group.size() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)
