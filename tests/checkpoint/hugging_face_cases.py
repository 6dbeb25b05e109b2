"""Small models and tokenizers in Hugging Face's form."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from moss_train.streams.config import TokenizerConfig
from moss_train.streams.tokenizer import SHIPPED_TOKENIZER, load_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "video_mllama_tiny"


def mllama(dtype: torch.dtype = torch.float32, **text: object):
    """transformers' Mllama at a size of about a hundred thousand parameters, for the shipped tokenizer."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    tokenizer = load_tokenizer(TokenizerConfig())
    special = tokenizer.special
    vision = MllamaVisionConfig(
        hidden_size=32, num_hidden_layers=4, num_global_layers=2, attention_heads=2, intermediate_size=48,
        vision_output_dim=96, image_size=28, patch_size=7, max_num_tiles=2, intermediate_layers_indices=[0, 2],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    sizes = {
        "vocab_size": tokenizer.vocabulary_size, "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 6,
        "num_key_value_heads": 2, "intermediate_size": 64, "cross_attention_layers": [1, 3],
        "pad_token_id": special.padding, "bos_token_id": special.begin_of_text, "eos_token_id": special.end_of_turn,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    }  # fmt: skip
    torch.manual_seed(3)
    config = MllamaConfig(
        vision_config=vision, text_config=MllamaTextConfig(**sizes | text), image_token_index=special.anchor
    )
    model = MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if "gate" in name else 0.15))
    return model.to(dtype)


def save_mllama(folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "100KB") -> Path:
    """`mllama` as transformers saves it, in several files, with the shipped tokenizer."""
    mllama(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    shutil.copy(SHIPPED_TOKENIZER, folder / "tokenizer.json")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def differing(ours: Path, theirs: Path) -> list[str]:
    """Names of tensors that are not the same, bits and dtype, in two folders."""
    own, other = tensors_of(ours), tensors_of(theirs)
    assert own.keys() == other.keys()
    return [
        name
        for name, tensor in own.items()
        if tensor.dtype != other[name].dtype or not torch.equal(_bits(tensor), _bits(other[name]))
    ]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def llama_tokenizer(path: Path, rows: int, specials: Sequence[tuple[int, str]]) -> Path:
    """Write a tokenizer.json of `rows` + 1 ids like Llama's: words, and `specials` (id, string) marked special."""
    vocabulary = {f"w{token}": token for token in range(rows + 1)}
    for token, string in specials:
        del vocabulary[f"w{token}"]
        vocabulary[string] = token
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.add_special_tokens([AddedToken(string, special=True) for _, string in specials])
    tokenizer.save(str(path))
    return path


def edit_json(path: Path, **changes: object) -> None:
    """Set fields of a JSON file; a dotted name reaches a field of an object, None removes it."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = content
        for parent in parents:
            node = node[parent]
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    path.write_text(json.dumps(content))
