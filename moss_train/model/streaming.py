"""Incremental use of the model: streams that grow token by token and frame by frame, with cached keys and values.

A frame's keys and values depend on the frame and its position alone, so adding a frame costs one tower pass and
never touches what was computed before; only a window drops frames, by not looking at them.

Shape suffixes: R rows, N new frames, L new tokens, M tokens the cache holds, F frames the cache holds, P vision
tokens of a frame, A query heads, B key/value heads, D head width, H decoder width, V rows of the head.
"""

import torch

from moss_train.model.attention import _attend
from moss_train.model.layers import CrossLayer, LayerInputs


class _CachedAttention:
    """The attention backend over the caches of `state`, for the tokens of one `extend` call."""

    def __init__(self, state: "StreamState", lengths_R, self_mask_RLM, cross_mask_RLF):
        self.state = state
        self.lengths_R = lengths_R
        self.self_mask_RLM = self_mask_RLM
        self.cross_mask_RLF = cross_mask_RLF

    def self_attention(self, layer, q_TRAD, k_TRBD, v_TRBD):
        state = self.state
        new_tokens = k_TRBD.shape[0]
        offset_L = torch.arange(new_tokens, device=k_TRBD.device)
        row, token = torch.nonzero(offset_L < self.lengths_R[:, None], as_tuple=True)
        keys, values = state.self_cache[layer]
        keys[row, state.tokens_R[row] + token] = k_TRBD[token, row]
        values[row, state.tokens_R[row] + token] = v_TRBD[token, row]
        used = self.self_mask_RLM.shape[-1]
        mixed = _attend(q_TRAD.transpose(0, 1), keys[:, :used], values[:, :used], mask=self.self_mask_RLM[:, None])
        return mixed.flatten(2).transpose(0, 1)

    def cross_attention(self, layer, q_TRAD, k_NPBD, v_NPBD):
        keys, values = self.state.cross_cache[layer]
        used = self.cross_mask_RLF.shape[-1]
        mask_RLK = self.cross_mask_RLF.repeat_interleave(keys.shape[2], dim=2)
        blind_RL1 = ~mask_RLK.any(-1, keepdim=True)
        mixed = _attend(
            q_TRAD.transpose(0, 1),
            keys[:, :used].flatten(1, 2),
            values[:, :used].flatten(1, 2),
            mask=(mask_RLK | blind_RL1)[:, None],
        ).flatten(2)
        return mixed.masked_fill(blind_RL1, 0.0).transpose(0, 1)


class StreamState:
    """Caches of several streams. Use through `VideoModel.start_streams`, `add_frames` and `extend`."""

    def __init__(self, model, rows: int, max_tokens: int, max_frames: int):
        self.model = model
        text = model.sizes.text
        parameter = model.final_norm.weight
        head_size = text.hidden_size // text.attention_heads
        heads = model.decoder_layers[0].attention.key.weight.shape[0] // head_size
        self.max_tokens, self.max_frames = max_tokens, max_frames
        self.tokens_R = torch.zeros(rows, dtype=torch.int64, device=parameter.device)
        self.frames_R = torch.zeros(rows, dtype=torch.int64, device=parameter.device)
        #: of the tokens last fed, logits of "speak now"; None without a decision head
        self.decisions_RL: torch.Tensor | None = None
        self.self_cache, self.cross_cache = {}, {}
        frame_tokens = model.sizes.tokens_per_frame
        for layer in model.decoder_layers:
            is_cross = isinstance(layer, CrossLayer)
            shape = (rows, max_frames, frame_tokens) if is_cross else (rows, max_tokens)
            cache = tuple(
                torch.zeros(*shape, heads, head_size, dtype=parameter.dtype, device=parameter.device) for _ in range(2)
            )
            (self.cross_cache if is_cross else self.self_cache)[layer.index] = cache

    @torch.no_grad()
    def add_frames(self, frames_NCHW: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> None:
        """Append frame n to row `rows_N[n]` at rotary position `positions_N[n]`, in the order given.

        Raises ValueError when a row would hold more than `max_frames` frames.
        """
        if frames_NCHW.shape[0] == 0:
            return
        slots = []
        for row in rows_N.tolist():
            slots.append(int(self.frames_R[row]))
            if slots[-1] >= self.max_frames:
                raise ValueError(f"row {row} holds max_frames={self.max_frames} frames already")
            self.frames_R[row] += 1
        slots_N = torch.tensor(slots, device=rows_N.device)
        features_1NPH = self.model.encode_frames(frames_NCHW)[None]
        rotation = self.model.frame_rotation(positions_N[None])
        for layer in self.model.decoder_layers:
            if layer.index in self.cross_cache:
                new_keys, new_values = layer.attention.keys_values(features_1NPH, rotation)
                keys, values = self.cross_cache[layer.index]
                keys[rows_N, slots_N] = new_keys[0]
                values[rows_N, slots_N] = new_values[0]

    @torch.no_grad()
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
    ):
        """Append `lengths_R[r]` (0 allowed) of the tokens `ids_RL[r]`; logits [R, L, V].

        A token sees frames `[visible_lo, visible_hi)` and, below `visible_hi`, the first `sinks` frames;
        by default every frame added so far; and tokens from `text_lo` on, and the first `text_sinks`, by default all.
        `cross_positions` are those among the frames, by default `positions`. Raises ValueError when a row would exceed
        `max_tokens`.
        """
        total_R = self.tokens_R + lengths_R
        if int(total_R.max()) > self.max_tokens:
            raise ValueError(f"a row would hold {int(total_R.max())} tokens, more than max_tokens={self.max_tokens}")
        device, new_tokens = ids_RL.device, ids_RL.shape[1]
        if visible_hi_RL is None:
            visible_hi_RL = self.frames_R[:, None].expand(-1, new_tokens)
        if visible_lo_RL is None:
            visible_lo_RL = torch.zeros_like(visible_hi_RL)
        offset_L = torch.arange(new_tokens, device=device)
        last_RL1 = (self.tokens_R[:, None] + offset_L)[..., None]
        token_M = torch.arange(int(total_R.max()), device=device)
        self_mask_RLM = token_M <= last_RL1
        if text_lo_RL is not None:
            self_mask_RLM = self_mask_RLM & ((token_M >= text_lo_RL[..., None]) | (token_M < text_sinks))
        frame_F = torch.arange(int(self.frames_R.max()), device=device)
        lo, hi = visible_lo_RL[..., None], visible_hi_RL[..., None]
        cross_mask_RLF = (frame_F < hi) & ((frame_F >= lo) | (frame_F < sinks))
        sees_TR1 = cross_mask_RLF.any(-1).T[..., None]
        inputs = LayerInputs(
            backend=_CachedAttention(self, lengths_R, self_mask_RLM, cross_mask_RLF),
            text_rotation=self.model.text_rotation(positions_RL.T),
            cross_rotation=self.model.text_rotation(
                (positions_RL if cross_positions_RL is None else cross_positions_RL).T
            ),
            frame_rotation=self.model.frame_rotation(positions_RL[:, :0]),
            features_NPH=None,
            sees_frames_TR1=sees_TR1 if len(frame_F) else None,
        )
        predictions = self.model.predict(ids_RL.T, inputs)
        self.decisions_RL = None if predictions.decisions_TR is None else predictions.decisions_TR.T
        self.tokens_R = total_R
        return predictions.logits_TRV.transpose(0, 1)
