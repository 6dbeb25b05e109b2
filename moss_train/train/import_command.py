"""`moss-train convert import`: a Hugging Face folder becomes one of our checkpoints."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from moss_train.checkpoint.hugging_face.folder import require_empty
from moss_train.checkpoint.hugging_face.sizes import CONFIG, read_sizes, size_differences
from moss_train.checkpoint.hugging_face.source import FLOATS, HuggingFaceSource, SafetensorsFiles, weight_files
from moss_train.checkpoint.hugging_face.tokenizer_files import REFERENCE_IDS, RESERVED, TOKENIZER
from moss_train.checkpoint.provenance import collect_provenance
from moss_train.checkpoint.store import save_checkpoint
from moss_train.errors import CheckpointError, ConfigError
from moss_train.model.build import whole_model
from moss_train.model.config import ModelConfig
from moss_train.model.precision import Precision
from moss_train.parallel import groups
from moss_train.streams.config import REFERENCE_SPECIAL_STRINGS, TokenizerConfig
from moss_train.streams.tokenizer import StreamTokenizer, load_tokenizer
from moss_train.train.compose import compose_run, resolved_dict
from moss_train.train.config import RunConfig, StageConfig
from moss_train.train.weights import Origin

STAGE = "imported"  #: the stage an imported checkpoint is of


@dataclass
class ImportOptions:
    """Options of `convert import`."""

    source: str
    """Folder with config.json and safetensors: Llama-3.2-Vision or MOSS-Video-Preview."""
    out: str
    """Folder to write the checkpoint into; must not exist, or be empty."""
    model: str | None = None
    """Recipe of the sizes (a name in `recipes/model/`), which says what video additions the model has from now on; null
    takes sizes and additions from config.json."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer; a null `path` takes the folder's own, see above."""

    def validate(self) -> None:
        self.tokenizer.validate()


def import_command(options: ImportOptions) -> int:
    """Turn Llama-3.2-Vision's or MOSS-Video-Preview's weights into a checkpoint of ours, bit by bit.

    The checkpoint can be trained from in any layout, evaluated, streamed and exported again. Weights are copied from
    file to file, so the model need not fit into memory. (`stages.<name>.init=` also takes such a folder as it is.)
    A null tokenizer.path means the folder's own tokenizer; roles that have no token in it, such as silence in Llama's,
    get the reserved tokens that MOSS-Video-Preview uses for them.

    Example: moss-train convert import source=Llama-3.2-11B-Vision-Instruct out=checkpoints/llama model=moss_video_11b
    """
    source, out = Path(options.source), Path(options.out)
    if not source.is_dir() or not weight_files(source):
        raise CheckpointError(f"source={source}: no folder with safetensors files; give the folder of a model")
    require_empty(out)
    sizes = _sizes(source, options.model)
    tokenizer_config, tokenizer = _tokenizer(source, options.tokenizer, sizes)
    try:
        with torch.device("meta"):
            model = whole_model(sizes, groups.initialize())
        files = SafetensorsFiles(source)
        weights = HuggingFaceSource(files, model)
        run = RunConfig(
            name=out.resolve().name,
            model=sizes,
            tokenizer=tokenizer_config,
            precision=_precision(files),
            stages={STAGE: StageConfig(init=str(source))},
        )
        state = {"stage": STAGE, "origin": Origin(source, hugging_face=True).fingerprint}
        tensors = {name: weights.read(name, (0,) * len(shape), shape) for name, shape in weights.shapes().items()}
        provenance = collect_provenance(resolved_dict(run), tokenizer.fingerprint)
        print(f"{source}: {_describe(sizes, model, run.precision, files)}", flush=True)
        written = save_checkpoint(out, 0, tensors, state, provenance)
    finally:
        groups.shutdown()
    print(f"wrote {written}\nuse it: moss-train train … {' '.join(_overrides(out, options.model, tokenizer_config))}")
    return 0


def _sizes(source: Path, recipe: str | None) -> ModelConfig:
    found = read_sizes(source)
    if recipe is None:
        return found
    # The recipe around the model does not matter: nothing but the model is taken from it.
    sizes = compose_run(["recipe=sft", f"model={recipe}"]).model
    sizes.decision_head = False  # the folder has none; a run that wants one starts it afresh
    if sizes.text.vocabulary_size is None:
        sizes.text.vocabulary_size = found.text.vocabulary_size
    differences = size_differences(sizes, found)
    if differences:
        raise ConfigError(
            f"model={recipe}: not the sizes of {source / CONFIG}; leave model out, or choose another recipe\n  "
            + "\n  ".join(differences)
        )
    return sizes


def _tokenizer(source: Path, config: TokenizerConfig, sizes: ModelConfig) -> tuple[TokenizerConfig, StreamTokenizer]:
    """The tokenizer with every role filled, and its configuration as a run needs it."""
    path = config.path
    if path is None:
        if not (source / TOKENIZER).is_file():
            raise ConfigError(f"{source} holds no {TOKENIZER}: add tokenizer.path=<the model's tokenizer.json>")
        path = str(source)
    ids = _reserved_ids(Path(path), config) | config.special_ids
    rows = sizes.text.vocabulary_size
    filled = replace(config, path=path, special=dict(config.special), special_ids=ids)
    tokenizer = load_tokenizer(filled)
    if tokenizer.vocabulary_size != rows and config.vocabulary_size is None:
        filled.vocabulary_size = rows  # a head may have rows to spare
        tokenizer = load_tokenizer(filled)
    if tokenizer.vocabulary_size != rows:
        raise ConfigError(
            f"tokenizer.vocabulary_size={tokenizer.vocabulary_size}: the head of {source} has {rows} rows; leave it out"
        )
    if tokenizer.special.anchor >= rows + sizes.text.extra_embedding_rows:
        raise ConfigError(
            f"tokenizer: the anchor's id {tokenizer.special.anchor} has no row in the embedding of {source}, which has "
            f"{rows + sizes.text.extra_embedding_rows}; name another token in tokenizer.special_ids.anchor"
        )
    return filled, tokenizer


def _reserved_ids(path: Path, config: TokenizerConfig) -> dict[str, int]:
    """Role → reserved token that MOSS-Video-Preview gives it, for roles whose own string the tokenizer lacks."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path / TOKENIZER if path.is_dir() else path))
    except Exception:  # the library raises bare Exception; load_tokenizer will say what is wrong
        return {}
    return {
        role: token
        for role, token in REFERENCE_IDS.items()
        if role not in config.special
        and tokenizer.token_to_id(REFERENCE_SPECIAL_STRINGS[role]) is None
        and (tokenizer.id_to_token(token) or "").startswith(RESERVED)
    }


def _precision(files: SafetensorsFiles) -> str:
    """The precision in which the checkpoint is used: that of most of the weights."""
    elements: Counter[str] = Counter()
    for name, shape in files.shapes().items():
        elements[files.dtypes()[name]] += torch.Size(shape).numel()
    dtype = FLOATS[elements.most_common(1)[0][0]]
    return Precision.of(torch.float32 if dtype == torch.float64 else dtype).name


def _describe(sizes: ModelConfig, model: torch.nn.Module, precision: str, files: SafetensorsFiles) -> str:
    pool = "unpooled" if sizes.pool == "none" else f"{sizes.pool} of {sizes.pool_stride} × {sizes.pool_stride} patches"
    cross = "rotated" if sizes.cross_rope else "not rotated"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{sizes.text.layers} layers, {parameters:,} parameters in {len(files.shapes())} tensors, {precision}; "
        f"{sizes.tokens_per_frame} tokens a frame ({pool}), cross-attention {cross}"
    )


def _overrides(out: Path, recipe: str | None, tokenizer: TokenizerConfig) -> list[str]:
    """What a run needs to start from the checkpoint."""
    settings = [f"model={recipe or '<recipe of these sizes>'}", f"stages.<stage>.init={out}"]
    settings.append(f"tokenizer.path={tokenizer.path}")
    settings += [f"tokenizer.special.{role}={string}" for role, string in tokenizer.special.items()]
    settings += [f"tokenizer.special_ids.{role}={token}" for role, token in tokenizer.special_ids.items()]
    if tokenizer.vocabulary_size is not None:
        settings.append(f"tokenizer.vocabulary_size={tokenizer.vocabulary_size}")
    return settings
