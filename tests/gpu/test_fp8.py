"""8-bit training: near bfloat16, refused where it cannot run, from weights that stay in bfloat16."""

import numpy as np
import pytest
import torch
from errors_beside import relative_error
from megatron.core.transformer import TransformerConfig
from model_cases import pack, stream, tiny_config

from moss_train.errors import ConfigError
from moss_train.model import modules
from moss_train.model.config import RecomputeConfig, TextConfig
from moss_train.model.precision import FP8_MULTIPLE, Precision, fp8_context
from moss_train.model.video_model import VideoModel

WIDTH, DEPTH = 512, 4
STEPS = 4
RATE = 1.0
#: Relative. Computed in 8 bits by torch on a CPU, this stack's gradients are 4 to 9 % away, its losses 0.3 %.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 0.02, 0.2


@pytest.fixture
def fp8(device, te) -> Precision:
    precision = Precision.named("fp8")
    try:
        precision.check_supported(device)
    except ConfigError as error:
        pytest.skip(str(error))
    return precision


class Stack(torch.nn.Module):
    """Residual feed-forward layers of the model's parts, each with its own 8-bit context, as in the decoder."""

    def __init__(self, precision: Precision, group):
        super().__init__()
        self.config = TransformerConfig(
            num_layers=DEPTH,
            hidden_size=WIDTH,
            num_attention_heads=4,
            add_bias_linear=False,
            normalization="RMSNorm",
            init_method=lambda weight: torch.nn.init.normal_(weight, std=WIDTH**-0.5),
            output_layer_init_method=lambda weight: torch.nn.init.normal_(weight, std=0.3 * WIDTH**-0.5),
            gradient_accumulation_fusion=False,
            **precision.megatron_options(),
        )
        self.norms = torch.nn.ModuleList(modules.rms_norm(self.config, WIDTH) for _ in range(DEPTH))
        self.ups = torch.nn.ModuleList(
            modules.column_linear(self.config, WIDTH, 2 * WIDTH, group) for _ in range(DEPTH)
        )
        self.downs = torch.nn.ModuleList(modules.row_linear(self.config, 2 * WIDTH, WIDTH, group) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            with fp8_context(self.config, self.training):
                x = x + down(torch.nn.functional.silu(up(norm(x))[0]))[0]
        return x


def pair(fp8: Precision, group, device) -> tuple[Stack, Stack]:
    torch.manual_seed(0)
    narrow, wide = (Stack(precision, group).to(device) for precision in (fp8, Precision.named("bf16")))
    wide.load_state_dict(narrow.state_dict())
    return narrow, wide


def loss_of(model: Stack, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (model(x) - target).float().square().mean()


def test_training_follows_bfloat16(fp8, device, parallel_state):
    narrow, wide = pair(fp8, parallel_state.tensor_group, device)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    x, target = torch.randn(2, 64, 2, WIDTH, device=device, dtype=torch.bfloat16)
    losses: list[tuple[float, float]] = []
    for step in range(STEPS):
        pairs = [loss_of(model, x, target) for model in (narrow, wide)]
        losses.append(tuple(float(loss) for loss in pairs))
        for model, loss in zip((narrow, wide), pairs, strict=True):
            model.zero_grad()
            loss.backward()
        if step == 0:
            for (name, a), b in zip(narrow.named_parameters(), wide.parameters(), strict=True):
                assert relative_error(a.grad, b.grad) < GRADIENT_TOLERANCE, name
        with torch.no_grad():
            for model in (narrow, wide):
                for parameter in model.parameters():
                    parameter -= RATE * parameter.grad
    for in_eight, in_sixteen in losses:
        assert in_eight == pytest.approx(in_sixteen, rel=LOSS_TOLERANCE)
    # Also in 8 bits each step computes with the weights that the last one left.
    assert losses[-1][0] < 0.8 * losses[0][0]


def test_it_is_eight_bits_in_training_alone(fp8, device, parallel_state):
    narrow, wide = pair(fp8, parallel_state.tensor_group, device)
    x = torch.randn(64, 2, WIDTH, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        assert relative_error(narrow.train()(x), wide(x)) > 1e-3
        assert torch.equal(narrow.eval()(x), wide(x))
        # Streaming brings any number of tokens.
        assert narrow.eval()(x[:3, :1]).isfinite().all()


def test_recomputation_is_in_eight_bits_too(fp8, device, parallel_state):
    """The context lies inside of what is recomputed, so both ways compute the same; bfloat16 is a percent away."""
    narrow, _ = pair(fp8, parallel_state.tensor_group, device)
    x = torch.randn(64, 2, WIDTH, device=device, dtype=torch.bfloat16)

    def gradients(run) -> list[torch.Tensor]:
        narrow.zero_grad()
        run().float().square().mean().backward()
        return [parameter.grad.clone() for parameter in narrow.parameters()]

    kept = gradients(lambda: narrow(x))
    again = gradients(
        lambda: torch.utils.checkpoint.checkpoint(narrow, x, use_reentrant=False, preserve_rng_state=False)
    )
    assert all(relative_error(a, b) < 1e-3 for a, b in zip(again, kept, strict=True))


def test_rows_that_are_not_padded_are_refused(fp8, device, parallel_state):
    """`token_multiple` says to what; this is why."""
    narrow, _ = pair(fp8, parallel_state.tensor_group, device)
    assert fp8.token_multiple(1, False) == FP8_MULTIPLE
    with pytest.raises(AssertionError, match="divisible"):
        narrow(torch.randn(FP8_MULTIPLE + 1, 1, WIDTH, device=device, dtype=torch.bfloat16))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_of_the_model(recompute, fp8, device, parallel_state):
    """Forward and backward pass of a small model: finite, and the loss of bfloat16 within its tolerance."""
    text = TextConfig(
        vocabulary_size=96, hidden_size=64, layers=5, cross_layers=[1, 3], attention_heads=4, key_value_heads=2,
        mlp_size=96, rope_theta=10000.0, rope_scaling=None,
    )  # fmt: skip
    config = tiny_config(text=text)
    fp8.check_sizes(config, 1)
    rng = np.random.default_rng(4)
    rows = [[stream(rng, 3), stream(rng, 2)], [stream(rng, 4)]]
    batch = pack(rows).padded(fp8.token_multiple(1, False)).to(device)

    def build(eight_bits: bool) -> VideoModel:
        torch.manual_seed(0)
        again = RecomputeConfig(self_layers=recompute, cross_layers=recompute)
        return VideoModel(config, parallel_state.tensor_group, torch.bfloat16, recompute=again, fp8=eight_bits).to(
            device
        )

    narrow, wide = build(True), build(False)
    with torch.no_grad():
        for mine, other in zip(narrow.parameters(), wide.parameters(), strict=True):
            mine.copy_(other)
    targets = batch.ids_RT.T.clamp(max=text.vocabulary_size - 1).flatten()
    losses = []
    for model in (narrow, wide):
        loss = torch.nn.functional.cross_entropy(model.train()(batch).float().flatten(0, 1), targets)
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=LOSS_TOLERANCE)
    gradients = {name: p.grad for name, p in narrow.named_parameters() if p.grad is not None}
    assert len(gradients) > 40 and all(gradient.isfinite().all() for gradient in gradients.values())
