"""A trained model back from its checkpoint, with all that is needed to use it."""

from pathlib import Path

from moss_train.checkpoint.store import CheckpointReader, load_checkpoint, open_checkpoint
from moss_train.engines.pieces import MemorySource
from moss_train.engines.weights import NAMESPACE, load_weights_into
from moss_train.errors import CheckpointError
from moss_train.model import build
from moss_train.model.precision import Precision
from moss_train.model.video_model import VideoModel
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig
from moss_train.streams.tokenizer import StreamTokenizer, load_tokenizer
from moss_train.train.compose import run_from_dict
from moss_train.train.config import RunConfig
from moss_train.train.weights import Origin, find_checkpoint


def load_model(path: str | Path) -> tuple[VideoModel, StreamTokenizer, RunConfig]:
    """The model of a checkpoint (or of a stage's newest, or of a run's last trained stage), in evaluation mode, its
    tokenizer and the run that made it. The whole model is on this process, whatever layout it was trained in. Starts
    process groups when there are none.

    Raises CheckpointError when there is no checkpoint, or it is damaged or made with another tokenizer.
    """
    reader, tokenizer, run = open_trained(path)
    state = groups.initialize(LayoutConfig(), run.seed)
    model = build.whole_model(run.model, state, Precision.named(run.precision).dtype)
    load_weights_into(model, Origin(reader.path, hugging_face=False).source(model))
    return model.to(state.device).eval(), tokenizer, run


def open_trained(path: str | Path) -> tuple[CheckpointReader, StreamTokenizer, RunConfig]:
    """A checkpoint as `load_model` finds it, its tokenizer and the run that made it; no weight is read.

    Errors are those of `load_model`.
    """
    checkpoint = find_checkpoint(Path(path)) if Path(path).exists() else None
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint there, nor in a stage's or run's folder of this name")
    reader = open_checkpoint(checkpoint)
    run = run_from_dict(reader.provenance["config"])
    tokenizer = load_tokenizer(run.tokenizer)
    if reader.provenance.get("tokenizer_fingerprint") != tokenizer.fingerprint:
        raise CheckpointError(
            f"{checkpoint} was trained with tokenizer {reader.provenance.get('tokenizer_fingerprint')}, but "
            f"tokenizer.path={run.tokenizer.path} is {tokenizer.fingerprint} by now: put the old one back"
        )
    return reader, tokenizer, run


def build_model(run: RunConfig) -> VideoModel:
    """The run's model with the fresh weights of its seed, on this process's device, in evaluation mode."""
    state = groups.initialize(LayoutConfig(), run.seed)
    dtype = Precision.named(run.precision).dtype
    model = build.whole_model(run.model, state, dtype)
    fresh = build.fresh_weights(run.model, state.own_group, dtype, run.seed)
    load_weights_into(model, MemorySource({f"{NAMESPACE}/{name}": weight for name, weight in fresh}))
    return model.to(state.device).eval()


def stage_of(path: str | Path) -> str:
    """Name of the stage whose checkpoint `load_model(path)` takes."""
    checkpoint = find_checkpoint(Path(path))
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint there, nor in a stage's or run's folder of this name")
    return load_checkpoint(checkpoint, only=()).state["stage"]
