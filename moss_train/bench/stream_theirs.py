"""A decoder-only video model for `bench stream`: the decoder of Qwen2.5-VL in transformers, with random weights.

Vision tokens are embeddings in the text sequence, as the tower would have left them; the tower itself is timed apart.
Positions are Qwen's three-dimensional ones. Attention is torch's `scaled_dot_product_attention` and the cache is
`DynamicCache`, what `generate` uses by itself.

Shape suffixes: T tokens, H width, N frames, P vision tokens of a frame.
"""

import inspect
from typing import Any

import torch

from moss_train.errors import ConfigError


class DecoderOnly:
    """One conversation about a video of a fixed number of frames."""

    def __init__(self, sizes: Any, device: torch.device, dtype: torch.dtype):
        """`sizes`: `bench.stream.StreamOptions`."""
        try:
            from transformers import DynamicCache
            from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel
        except ImportError as error:
            raise ConfigError("bench stream compares with transformers: pip install transformers") from error
        config = Qwen2_5_VLTextConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.mlp,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.key_value_heads,
            max_position_embeddings=131_072,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": _sections(sizes.hidden // sizes.heads),
            },
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        self._decoder = Qwen2_5_VLTextModel(config).to(device, dtype).eval()
        self._head = torch.nn.Linear(sizes.hidden, sizes.vocabulary, bias=False, device=device, dtype=dtype)
        self._sizes, self._device, self._dtype = sizes, device, dtype
        self._new_cache = lambda: DynamicCache(config=config)
        parameters = inspect.signature(Qwen2_5_VLTextModel.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._cache: Any = None
        self._next_position = 0
        self._token = torch.zeros(1, 1, dtype=torch.long, device=device)

    @property
    def parameters(self) -> int:
        """Of the decoder's layers, without embedding and head."""
        return sum(parameter.numel() for parameter in self._decoder.layers.parameters())

    @torch.inference_mode()
    def prepare(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [1, T, H] and positions [3, 1, T] of a prompt with so many frames; made outside the timer."""
        sizes = self._sizes
        vision = sizes.their_vision_tokens
        random = torch.Generator().manual_seed(1)
        pictures = torch.randn(1, frames * vision, sizes.hidden, generator=random) * 0.02
        before, after = (
            self._decoder.embed_tokens(
                torch.randint(0, sizes.vocabulary, (1, count), generator=random).to(self._device)
            )
            for count in (sizes.prompt_before, sizes.question)
        )
        embedded = torch.cat([before, pictures.to(self._device, self._dtype), after], 1)
        side = max(side for side in range(1, int(vision**0.5) + 1) if vision % side == 0)
        token = torch.arange(frames * vision)
        place = token % vision
        grid = torch.stack([token // vision, place // (vision // side), place % (vision // side)]) + sizes.prompt_before
        start = torch.arange(sizes.prompt_before).expand(3, -1)
        end = torch.arange(sizes.question).expand(3, -1) + int(grid.max()) + 1
        self._next_position = int(end.max()) + 1
        return embedded, torch.cat([start, grid, end], 1)[:, None].to(self._device)

    @torch.inference_mode()
    def cold(self, prompt: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Prefill and the first token."""
        self._cache = None  # the last one's memory first
        self._cache = self._new_cache()
        self._step(*prompt)

    @torch.inference_mode()
    def decode(self, tokens: int) -> None:
        """Greedy tokens, one by one."""
        for _ in range(tokens):
            position = torch.full((3, 1, 1), self._next_position, device=self._device)
            self._step(self._decoder.embed_tokens(self._token), position)
            self._next_position += 1

    @torch.inference_mode()
    def question(self) -> None:
        """A question with the frames already in the cache: its first token."""
        ids = torch.randint(0, self._sizes.vocabulary, (1, self._sizes.question), device=self._device)
        positions = self._next_position + torch.arange(self._sizes.question, device=self._device)
        self._step(self._decoder.embed_tokens(ids), positions.expand(3, 1, -1))

    def forget(self, tokens: int) -> None:
        """Take the latest tokens out of the cache."""
        self._cache.crop(-tokens)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values."""
        tensors = [x for layer in self._cache.layers for x in (layer.keys, layer.values)]
        return sum(x.numel() * x.element_size() for x in tensors)

    def _step(self, embedded: torch.Tensor, positions: torch.Tensor) -> None:
        out = self._decoder(
            inputs_embeds=embedded, position_ids=positions, use_cache=True, **{self._cache_name: self._cache}
        )
        self._token = self._head(out.last_hidden_state[:, -1:]).argmax(-1)


def _sections(head: int) -> list[int]:
    """Of the rotary channels, those of time, height and width: 16, 24, 24 of 64 in Qwen2.5-VL."""
    half = head // 2
    time = half // 4
    height = (half - time) // 2
    return [time, height, half - time - height]
