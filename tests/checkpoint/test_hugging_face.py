"""Hugging Face in and out: every tensor bit by bit, and transformers loads what comes out."""

import json

import pytest
import torch
from hugging_face_cases import GOLDEN, differing, edit_json, llama_tokenizer, save_mllama, tensors_of
from safetensors.torch import load_file, save_file

from moss_train.checkpoint.hugging_face.mapping import HEADS, INTERLEAVED, reference_tensors, sections
from moss_train.checkpoint.hugging_face.mapping import normalise_reference_name as normal
from moss_train.checkpoint.hugging_face.sizes import config_json, read_sizes
from moss_train.checkpoint.store import latest, open_checkpoint, save_checkpoint
from moss_train.checkpoint.verify import model_config
from moss_train.cli import main
from moss_train.errors import CheckpointError
from moss_train.model.build import whole_model
from moss_train.model.config import ModelConfig
from moss_train.parallel import groups
from moss_train.streams.config import REFERENCE_SPECIAL_STRINGS, TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer
from moss_train.train.compose import compose_run
from moss_train.train.restore import load_model
from moss_train.train.weights import find_origin


def convert(direction: str, **options: object) -> None:
    assert main(["convert", direction, *(f"{name}={value}" for name, value in options.items())]) == 0


def there_and_back(source, folder, **imported: object):
    convert("import", source=source, out=folder / "checkpoint", **imported)
    convert("export", ckpt=folder / "checkpoint", out=folder / "exported", shard_bytes="150KB")
    return folder / "exported"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_import_then_export_is_bit_identical(dtype, tmp_path):
    source = save_mllama(tmp_path / "source", dtype)
    exported = there_and_back(source, tmp_path)
    assert differing(exported, source) == []
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    found = tensors_of(exported)
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_tensors_of_several_precisions_keep_theirs(tmp_path):
    source = save_mllama(tmp_path / "source", torch.bfloat16)
    for file in source.glob("*.safetensors"):
        tensors = {name: t.float() if "norm" in name else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert differing(there_and_back(source, tmp_path), source) == []


def test_transformers_loads_the_export_and_computes_the_same(tmp_path):
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    source = save_mllama(tmp_path / "source")
    exported = there_and_back(source, tmp_path)
    theirs = MllamaForConditionalGeneration.from_pretrained(source)
    ours, told = MllamaForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert ours.dtype == torch.float32 and ours.generation_config.pad_token_id == theirs.config.text_config.pad_token_id
    before, after = (read_sizes(folder) for folder in (source, exported))
    before.name = after.name
    assert before == after

    # The processor, too, is the folder's own.
    processor = AutoProcessor.from_pretrained(exported)
    picture = torch.randint(0, 255, (3, 40, 70), dtype=torch.uint8)
    inputs = processor(images=picture, text="<|image|>What is this?", return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (28, 28) and ours.config.image_token_index in inputs["input_ids"]
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


def test_names_of_newer_transformers_are_read(tmp_path):
    source = save_mllama(tmp_path / "source")
    newer = tmp_path / "newer"
    newer.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (newer / name).write_bytes((source / name).read_bytes())
    from transformers import MllamaForConditionalGeneration

    state = MllamaForConditionalGeneration.from_pretrained(source).state_dict()
    assert "lm_head.weight" in state and "model.language_model.embed_tokens.weight" in state
    save_file(state, newer / "model.safetensors")
    assert differing(there_and_back(newer, tmp_path), source) == []


@pytest.fixture
def golden(tmp_path):
    """The reference implementation's tiny MOSS-Video-Preview, with a tokenizer in which three roles have no name."""
    folder = tmp_path / "moss"
    folder.mkdir()
    reference = json.loads(GOLDEN.with_suffix(".json").read_text())
    sizes = model_config(reference, reference_compat=False, attention="segments")
    roles = {"silence": 7, "video": 8, "ellipsis": 9, "anchor": 256}
    numbers = iter(range(10, 20))
    specials = [
        (roles[role], f"<|reserved_special_token_{roles[role]}|>")
        if role in ("silence", "video", "ellipsis")
        else (roles.get(role, next(numbers)), string)
        for role, string in REFERENCE_SPECIAL_STRINGS.items()
    ]
    llama_tokenizer(folder / "tokenizer.json", 256, specials)
    tokenizer = load_tokenizer(TokenizerConfig(str(folder), special_ids={"silence": 7, "video": 8, "ellipsis": 9}))
    (folder / "config.json").write_text(json.dumps(config_json(sizes, tokenizer.special, torch.float32)))
    save_file(load_file(GOLDEN.with_suffix(".weights.safetensors")), folder / "model.safetensors")
    return folder


def test_the_reference_model_goes_in_and_out(golden, tmp_path):
    """Bit-identical under the reference's names; video additions from the config and in it; tokens renamed."""
    ids = {f"tokenizer.special_ids.{role}": token for role, token in {"silence": 7, "video": 8, "ellipsis": 9}.items()}
    exported = there_and_back(golden, tmp_path, **ids)
    assert differing(exported, golden) == []
    sizes = read_sizes(exported)
    assert (sizes.pool, sizes.pool_stride, sizes.cross_rope, sizes.vision.full_attention) == ("average", 2, True, True)
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["VideoMllamaForConditionalGeneration"]
    assert (config["vision_config"]["merge_mode"], config["vision_config"]["merge_size"]) == ("average", 2)
    # No role needs an id of its own any more, and all have the ids they had.
    before = load_model(tmp_path / "checkpoint")[1]
    after = load_tokenizer(TokenizerConfig(str(exported)))
    assert after.special == before.special and after.token(7) == "<|silence|>"
    groups.shutdown()


def test_the_config_of_the_reference_code_has_its_recipes_additions(golden):
    """Its training code saves Llama's config under its own class: pooling and the rest are command-line options."""
    edit_json(golden / "config.json", vision_config__merge_mode=None, vision_config__merge_size=None, moss_train=None)
    edit_json(golden / "config.json", vision_config__image_size=112)
    sizes = read_sizes(golden)
    assert (sizes.pool, sizes.pool_stride, sizes.cross_rope, sizes.vision.full_attention) == ("average", 4, True, True)
    edit_json(golden / "config.json", architectures=["MllamaForConditionalGeneration"])
    sizes = read_sizes(golden)
    assert (sizes.pool, sizes.cross_rope, sizes.vision.full_attention) == ("none", False, False)


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("llama_3_2_vision_11b", 10_670_220_835),
        ("moss_video_11b", 10_670_220_835),
        ("llama_3_2_vision_90b", 88_593_355_323),
        ("moss_video_90b", 88_593_355_323),
    ],
)
def test_published_sizes_equal_transformers(recipe, parameters, tmp_path):
    """Names, shapes and count of an export, against transformers' Mllama built on the meta device from its config."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    sizes = compose_run(["recipe=sft", f"model={recipe}"]).model
    special = load_tokenizer(TokenizerConfig()).special
    (tmp_path / "config.json").write_text(json.dumps(config_json(sizes, special, torch.bfloat16)))
    with torch.device("meta"):
        ours = reference_tensors(whole_model(sizes, groups.initialize()))
        theirs = MllamaForConditionalGeneration(MllamaConfig.from_pretrained(tmp_path)).state_dict()
    groups.shutdown()
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        normal(name): tuple(tensor.shape) for name, tensor in theirs.items()
    }
    assert sum(torch.Size(tensor.shape).numel() for tensor in ours.values()) == parameters
    read = read_sizes(tmp_path)
    read.name, read.initial_gate = sizes.name, sizes.initial_gate
    assert read == sizes


def test_the_table_names_what_bites():
    rows = [(ours, rule) for section, _ in sections(ModelConfig()) for ours, _, rule in section.rows]
    assert {rule for ours, rule in rows if ours == "projector.weight"} == {INTERLEAVED}
    for part in ("query", "key", "value", "output"):
        assert {rule for ours, rule in rows if ours == f"attention.{part}.weight"} == {HEADS}
    assert all(rule.why for _, rule in rows)


def test_an_imported_checkpoint_is_one_like_any_other(tmp_path):
    """It starts a stage and is loaded as a model, with the additions of the recipe it was imported as."""
    source = save_mllama(tmp_path / "source", torch.bfloat16)
    convert("import", source=source, out=tmp_path / "checkpoint")
    model, tokenizer, run = load_model(tmp_path / "checkpoint")
    assert run.precision == "bf16" and model.head.weight.dtype == torch.bfloat16
    head = tensors_of(source)["language_model.lm_head.weight"]
    assert torch.equal(model.head.weight, head)
    origin = find_origin(tmp_path / "checkpoint")
    origin.check(model, tokenizer)
    assert not origin.hugging_face and origin.fingerprint == open_checkpoint(latest(tmp_path / "checkpoint")).digest
    groups.shutdown()


def test_a_folder_whose_config_says_otherwise_starts_no_run(tmp_path):
    """What no shape shows, such as the number of heads."""
    source = save_mllama(tmp_path / "source")
    sizes = read_sizes(source)
    with torch.device("meta"):
        model = whole_model(sizes, groups.initialize())
    tokenizer = load_tokenizer(TokenizerConfig())
    find_origin(source).check(model, tokenizer)
    edit_json(source / "config.json", text_config__num_attention_heads=12)
    with pytest.raises(CheckpointError, match="text.attention_heads is 6, config.json says 12"):
        find_origin(source).check(model, tokenizer)
    groups.shutdown()


def test_the_export_of_a_run_has_the_runs_precision(tmp_path):
    """Trained weights are kept in float32, whatever the run computes in."""
    source = save_mllama(tmp_path / "source", torch.bfloat16)
    convert("import", source=source, out=tmp_path / "imported")
    imported = open_checkpoint(latest(tmp_path / "imported"))
    trained = {name: tensor.float() + 1e-5 for name, tensor in imported.tensors().items()}
    state = imported.state | {"stage": "sft"}
    save_checkpoint(tmp_path / "trained", 1, trained, state, imported.provenance)
    for wanted, expected in ((None, torch.bfloat16), ("stored", torch.float32), ("float16", torch.float16)):
        out = tmp_path / f"exported-{wanted}"
        convert("export", ckpt=tmp_path / "trained", out=out, **({"dtype": wanted} if wanted else {}))
        found = tensors_of(out)
        assert {tensor.dtype for tensor in found.values()} == {expected}
        head = trained["model/head.weight"].to(expected)
        assert torch.equal(found["language_model.lm_head.weight"], head)
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(expected).removeprefix("torch.")


def test_llamas_own_tokenizer_needs_no_options(tmp_path, capsys):
    """Silence and video get the reserved tokens that the reference renames; how to train from it is printed."""
    from hugging_face_cases import mllama

    ids = {
        "begin_of_text": 128000, "end_of_text": 128001, "padding": 128004, "start_header": 128006,
        "end_header": 128007, "end_of_turn": 128009, "anchor": 128256,
    }  # fmt: skip
    specials = [(token, REFERENCE_SPECIAL_STRINGS[role]) for role, token in ids.items()]
    specials += [(token, f"<|reserved_special_token_{token - 128009}|>") for token in (128011, 128012, 128255)]
    source = tmp_path / "source"
    mllama(torch.bfloat16, vocab_size=128256, pad_token_id=128004, bos_token_id=128000).save_pretrained(source)
    llama_tokenizer(source / "tokenizer.json", 128256, specials)
    convert("import", source=source, out=tmp_path / "checkpoint")
    assert "tokenizer.special_ids.silence=128011 " in capsys.readouterr().out
    _, tokenizer, _ = load_model(tmp_path / "checkpoint")
    groups.shutdown()
    assert (tokenizer.special.silence, tokenizer.special.ellipsis, tokenizer.special.video) == (128011, 128012, 128255)
    convert("export", ckpt=tmp_path / "checkpoint", out=tmp_path / "exported")
    assert differing(tmp_path / "exported", source) == []
    # As it was published: what is Llama's stays Llama's.
    assert (tmp_path / "exported" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()


def test_files_of_a_published_folder_are_taken_over(golden, tmp_path):
    (golden / "modeling_video_mllama.py").write_text("raise RuntimeError('never run')\n")
    edit_json(golden / "config.json", auto_map={"AutoModel": "modeling_video_mllama.Model"}, torch_dtype="bfloat16")
    ids = {f"tokenizer.special_ids.{role}": token for role, token in {"silence": 7, "video": 8}.items()}
    convert("import", source=golden, out=tmp_path / "checkpoint", **ids)
    convert("export", ckpt=tmp_path / "checkpoint", out=tmp_path / "exported", like=golden)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["auto_map"] and config["torch_dtype"] == "float32"
    assert (tmp_path / "exported" / "modeling_video_mllama.py").is_file()
    assert differing(tmp_path / "exported", golden) == []
