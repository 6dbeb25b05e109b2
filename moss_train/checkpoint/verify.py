"""`moss-train convert verify`: does the model compute what the reference implementation computed?

A reference set is three files: the sizes and scalar results (JSON), the weights under the reference's names and
the inputs and outputs of each case (safetensors). `tests/golden/README.md` describes them.

Shape suffixes: T tokens, F frames, P vision tokens of a frame, D channels; the batch is one row.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moss_train.checkpoint.hugging_face.mapping import export_tensors
from moss_train.checkpoint.hugging_face.source import HuggingFaceSource, SafetensorsFiles
from moss_train.data.batch import Batch, plain_places
from moss_train.engines.weights import load_weights_into
from moss_train.errors import CheckpointError
from moss_train.model.config import ModelConfig, RopeScaling, TextConfig, VisionConfig
from moss_train.model.video_model import VideoModel
from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups
from moss_train.streams.compiled import IGNORED_LABEL, Kind

#: Largest deviation that counts as equal, in fp32: absolute, but relative for the gradient norms.
TOLERANCES = {
    "pooled_features": 2e-5,
    "projected_features": 2e-5,
    "logits": 2e-5,
    "loss_plain": 2e-5,
    "loss_silence_weighted": 2e-5,
    "grad_norms": 1e-4,
}


@dataclass
class VerifyOptions:
    """Where the reference set lies, and with which semantics to compare."""

    config: str
    """JSON with the sizes, the losses and the gradient norms."""
    weights: str
    """safetensors with the weights under the reference's names."""
    io: str
    """safetensors with inputs and outputs of every case."""
    reference_compat: bool = True
    """Reproduce the reference's leak. With false, cases with text before the first frame are shown, not judged."""
    attention: str = "segments"
    """Attention backend: segments or dense."""


def model_config(reference: dict, reference_compat: bool, attention: str) -> ModelConfig:
    """The sizes of a reference set; the legend of its abbreviations is in `tests/golden/README.md`."""
    sizes, rope = reference["config"], reference["rope"]
    return ModelConfig(
        name="reference",
        vision=VisionConfig(
            hidden_size=sizes["vh"],
            local_layers=sizes["vl"],
            global_layers=sizes["vg"],
            attention_heads=sizes["vnh"],
            mlp_size=sizes["vffn"],
            image_size=sizes["img"],
            intermediate_layers=sizes["vi"],
            norm_eps=reference["layernorm_eps_vision"],
        ),
        text=TextConfig(
            vocabulary_size=sizes["vocab"],
            hidden_size=sizes["h"],
            layers=sizes["L"],
            cross_layers=sizes["x"],
            attention_heads=sizes["nh"],
            key_value_heads=sizes["nkv"],
            mlp_size=sizes["ffn"],
            norm_eps=reference["rms_norm_eps"],
            rope_theta=rope["theta"],
            rope_scaling=RopeScaling(*rope["llama3"]) if rope.get("llama3") else None,
        ),
        pool_stride=reference["pool_stride"],
        reference_compat=reference_compat,
        attention=attention,
    )


def case_batch(io: dict[str, torch.Tensor], case: str, silence_id: int) -> Batch:
    """The inputs of one case as a batch; `last_visible_frame` is an index, -1 for none."""
    ids_1T, pixels_FCHW = io[f"{case}.input_ids"], io[f"{case}.pixel_values"][0, :, 0]
    labels_1T = torch.full_like(ids_1T, IGNORED_LABEL)
    labels_1T[:, :-1] = io[f"{case}.labels"][:, 1:]
    kinds_1T = torch.full_like(ids_1T, Kind.TEXT).masked_fill(labels_1T == silence_id, Kind.IDLE_SILENCE)
    tokens, frames = ids_1T.shape[1], pixels_FCHW.shape[0]
    nothing = torch.zeros(1, tokens, dtype=torch.int32)
    return Batch(
        ids_RT=ids_1T,
        labels_RT=labels_1T,
        kinds_RT=kinds_1T.masked_fill(labels_1T == IGNORED_LABEL, Kind.IGNORED).to(torch.uint8),
        weights_RT=torch.ones(1, tokens),
        positions_RT=torch.arange(tokens)[None],
        segments_RT=nothing,
        visible_lo_RT=nothing,
        visible_hi_RT=(io[f"{case}.last_visible_frame"][None] + 1).to(torch.int32),
        sink_lo_RT=nothing,
        sink_hi_RT=nothing,
        origins_RT=torch.full_like(ids_1T, -1),
        **plain_places(torch.arange(tokens)[None]),
        frames_NCHW=pixels_FCHW,
        frame_rows_N=torch.zeros(frames, dtype=torch.int64),
        frame_slots_N=torch.arange(frames),
        frame_positions_RF=io[f"{case}.vision_position_ids"],
        frame_counts_R=torch.tensor([frames]),
        keys=((case,),),
        sources=(("reference",),),
    )


def compare_case(model: VideoModel, reference: dict, io: dict[str, torch.Tensor], case: str) -> dict[str, float]:
    """Largest deviation of each of `TOLERANCES` for one case."""
    silence_id, expected = reference["config"]["sil"], reference["cases"][case]
    batch = case_batch(io, case, silence_id)
    weight = reference["silence_token_weight"]

    pooled_FPD = model.pooled_features(batch.frames_NCHW)
    projected_FPD = model.projector(pooled_FPD)
    logits_T1V = model(batch)
    plain = StreamingLoss(ObjectiveConfig())
    weighted = StreamingLoss(ObjectiveConfig(weights={"idle_silence": weight, "stop_silence": weight}))
    loss_plain = plain(logits_T1V, batch, plain.totals(batch)).loss
    loss_weighted = weighted(logits_T1V, batch, weighted.totals(batch)).loss
    model.zero_grad()
    loss_weighted.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach() for name, p in model.named_parameters()
    }
    norms = {name: gradient.norm().item() for name, gradient in export_tensors(model, gradients).items()}
    expected_norms = expected["grad_norms_of_silence_weighted_loss"]
    # A gradient that is zero up to rounding has no meaningful relative deviation.
    floor = 1e-6 * max(expected_norms.values())
    return {
        "pooled_features": _largest(pooled_FPD, io[f"{case}.pooled_features"][0, :, 0]),
        "projected_features": _largest(projected_FPD, io[f"{case}.projected_features"][0, :, 0]),
        "logits": _largest(logits_T1V[:, 0], io[f"{case}.logits"][0]),
        "loss_plain": abs(loss_plain.item() - expected["loss_plain"]),
        "loss_silence_weighted": abs(loss_weighted.item() - expected[f"loss_silence_weighted_{weight}"]),
        "grad_norms": max(abs(norms[name] - value) / max(value, floor) for name, value in expected_norms.items()),
    }


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        raise CheckpointError(f"the model gives shape {tuple(ours.shape)}, the reference has {tuple(theirs.shape)}")
    return (ours.detach() - theirs).abs().max().item()


def read_reference(path: Path) -> dict:
    """The JSON of a reference set; CheckpointError, which names the file, when it has another form."""
    try:
        reference = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    _demand(path, reference, "the whole", dict)
    for name in ("config", "rope", "cases"):
        _demand(path, reference.get(name, {}), name, dict)
    for name in ("silence_token_weight", "rms_norm_eps", "layernorm_eps_vision"):
        _demand(path, reference.get(name, 0), name, float)
    for case, expected in reference.get("cases", {}).items():
        _demand(path, expected, case, dict)
        for name, value in expected.items():
            norms = name == "grad_norms_of_silence_weighted_loss"
            _demand(path, value, f"{case}.{name}", dict if norms else float)
            for parameter, norm in value.items() if norms else ():
                _demand(path, norm, f"{case}.{name}.{parameter}", float)
    return reference


def _demand(path: Path, value: object, name: str, form: type) -> None:
    legal = isinstance(value, (int, float) if form is float else form)
    if not legal:
        wanted = "a number" if form is float else "an object"
        raise CheckpointError(f"{path}: {name} should be {wanted}, but is {json.dumps(value)[:40]}")


def verify(options: VerifyOptions) -> dict:
    """Compare every case; the result has the form of design §7. CheckpointError when the files do not fit."""
    reference = read_reference(Path(options.config))
    weights, outputs = SafetensorsFiles(options.weights), SafetensorsFiles(options.io)
    io = {name: outputs.tensor(name) for name in outputs.shapes()}
    state = groups.initialize()
    figures, failures = {}, []
    try:
        try:
            config = model_config(reference, options.reference_compat, options.attention)
            model = VideoModel(config, state.tensor_group)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{options.config}: the sizes describe no model ({error})") from error
        load_weights_into(model, HuggingFaceSource(weights, model))
        for case, expected in reference["cases"].items():
            deviations = compare_case(model, reference, io, case)
            judged = _is_judged(expected, options)
            for name, value in deviations.items():
                figures[f"{case}.{name}"] = value
                # `not <=` so that a NaN fails.
                if judged and not value <= TOLERANCES[name]:
                    failures.append(f"{case}.{name} deviates by {value:.3g}, more than {TOLERANCES[name]:g}")
    except KeyError as error:
        raise CheckpointError(
            f"the reference set lacks {error}; see tests/golden/README.md for what it holds"
        ) from None
    return {"name": "convert verify", "ok": not failures, "figures": figures, "failures": failures}


def _is_judged(case: dict, options: VerifyOptions) -> bool:
    return options.reference_compat or not case["prefix_tokens_that_see_no_frame"]


def verify_command(options: VerifyOptions) -> int:
    """Compare the model with the outputs of a reference implementation.

    Prints the largest deviation of features, logits, losses and gradient norms for every case, then one JSON line.
    """
    result = verify(options)
    table = Table(title=f"largest deviation from the reference (reference_compat={options.reference_compat})")
    table.add_column("figure")
    table.add_column("deviation", justify="right")
    table.add_column("tolerance", justify="right")
    cases = read_reference(Path(options.config))["cases"]
    failed = {failure.split()[0] for failure in result["failures"]}
    for name, value in result["figures"].items():
        mark = "red" if name in failed else "default"
        case, figure = name.rsplit(".", 1)
        tolerance = f"{TOLERANCES[figure]:g}" if _is_judged(cases[case], options) else "not judged"
        table.add_row(name, f"[{mark}]{value:.3g}[/]", tolerance)
    Console().print(table)
    print(json.dumps(result))
    groups.shutdown()
    return 0 if result["ok"] else 1
