"""A tiny model, batches with and without frames, and the plain-torch training that engines must equal."""

from moss_train import parallel  # noqa: F401  the CPU seam goes in before megatron is imported

# isort: split
import torch

from moss_train.data.batch import Batch, plain_places
from moss_train.engines.config import OptimConfig
from moss_train.model.config import ModelConfig, TextConfig, VisionConfig
from moss_train.model.groups import parameter_groups
from moss_train.model.video_model import VideoModel
from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups
from moss_train.streams.compiled import IGNORED_LABEL, Kind

VOCABULARY = 32
SILENCE = 3
TINY_VISION = VisionConfig(
    hidden_size=8,
    local_layers=2,
    global_layers=1,
    attention_heads=2,
    mlp_size=16,
    patch_size=4,
    image_size=16,
    intermediate_layers=[0, 1],
)
OBJECTIVE = ObjectiveConfig(weights={"idle_silence": 0.3}, focal_gamma=1.0)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> VideoModel:
    """Every part of the real model, in a few thousand parameters; gates are open."""
    torch.manual_seed(seed)
    config = ModelConfig(
        name="engine_test",
        vision=TINY_VISION,
        text=TextConfig(
            vocabulary_size=VOCABULARY,
            hidden_size=16,
            layers=3,
            cross_layers=[1],
            attention_heads=4,
            key_value_heads=2,
            mlp_size=32,
            rope_scaling=None,
        ),
        initial_gate=0.5,
        init_std=0.1,
        decision_head=True,
    )
    return VideoModel(config, groups.initialize().tensor_group, dtype)


def batch(seed: int, rows: int = 2, length: int = 10, frames: int = 3) -> Batch:
    """`rows` streams of one frame each `length // frames` tokens; `frames = 0` is text only."""
    generator = torch.Generator().manual_seed(seed)
    ids_RT = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    kinds_RT = torch.randint(0, len(Kind), (rows, length), generator=generator)
    labels_RT = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels_RT[(kinds_RT == Kind.IDLE_SILENCE) | (kinds_RT == Kind.STOP_SILENCE)] = SILENCE
    labels_RT[kinds_RT == Kind.IGNORED] = IGNORED_LABEL
    positions_RT = torch.arange(length).expand(rows, length).clone()
    visible_hi_RT = torch.zeros(rows, length, dtype=torch.int32)
    anchors = torch.arange(frames) * (length // max(1, frames)) + 1
    for anchor in anchors:
        ids_RT[:, anchor] = VOCABULARY
        visible_hi_RT[:, anchor:] += 1
    zeros = torch.zeros(rows, length, dtype=torch.int32)
    return Batch(
        ids_RT=ids_RT,
        labels_RT=labels_RT,
        kinds_RT=kinds_RT.to(torch.uint8),
        weights_RT=torch.ones(rows, length),
        positions_RT=positions_RT,
        segments_RT=zeros.clone(),
        visible_lo_RT=zeros.clone(),
        visible_hi_RT=visible_hi_RT,
        sink_lo_RT=zeros.clone(),
        sink_hi_RT=zeros.clone(),
        origins_RT=torch.full_like(ids_RT, -1),
        **plain_places(positions_RT),
        frames_NCHW=torch.randint(0, 256, (rows * frames, 3, 16, 16), generator=generator).to(torch.uint8),
        frame_rows_N=torch.arange(rows).repeat_interleave(frames),
        frame_slots_N=torch.arange(frames).repeat(rows),
        frame_positions_RF=anchors.expand(rows, frames).clone(),
        frame_counts_R=torch.full((rows,), frames),
    )


def global_batches(steps: int, microbatches: int = 4) -> list[list[Batch]]:
    """Microbatches of unequal size, one of them without frames."""
    return [
        [batch(100 * step + i, rows=1 + i % 2, frames=0 if i == 1 else 3) for i in range(microbatches)]
        for step in range(steps)
    ]


def setup_engine(engine, model, optim: OptimConfig, total_steps: int = 5, trainable=None, objective=OBJECTIVE):
    """The engine, set up on `model` with everything trained unless told otherwise."""
    trainable = {name for name, _ in model.named_parameters()} if trainable is None else trainable
    engine.setup(model, trainable, optim, StreamingLoss(objective, SILENCE, anchor_id=VOCABULARY), total_steps)
    return engine


class PlainTraining:
    """torch.optim.AdamW on a model of the same seed, one backward pass over the whole global batch, nothing shared."""

    def __init__(self, optim: OptimConfig, trainable=None, seed: int = 0):
        self.model, self.optim = tiny_model(seed), optim
        group_of = parameter_groups(self.model)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [parameter],
                    "peak": optim.group_lr.get(group_of[name], optim.lr),
                    "weight_decay": optim.weight_decay if parameter.dim() > 1 else 0.0,
                }
                for name, parameter in self.model.named_parameters()
                if trainable is None or name in trainable
            ],
            lr=optim.lr,
            betas=tuple(optim.betas),
            eps=optim.eps,
        )

    def step(self, microbatches: list[Batch], factor: float) -> tuple[float, float]:
        """One step at `factor` of every peak rate; loss and gradient norm."""
        objective = StreamingLoss(OBJECTIVE, anchor_id=VOCABULARY)
        totals = sum(objective.totals(one) for one in microbatches)
        loss = sum(objective(self.model.predictions(one), one, totals).loss for one in microbatches)
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.optim.clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.step()
        return loss.item(), norm.item()
