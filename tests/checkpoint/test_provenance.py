import json

from moss_train.checkpoint.provenance import collect_provenance, git_revision
from moss_train.redact import HIDDEN, redact

SECRETS = {
    "tracking": {"wandb_api_key": "0123456789", "entity": "lab", "password": "hunter2"},
    "hf_token": "abc",
    "auth_token": "abc",
    "token": "abc",
    "environment": ["PATH=/bin", "x=hf_abcdefghijklmnopqrstuvwxyz"],
    "mirror": "https://user:pass@example.org/simple",
    "nested": [{"client_secret": "s"}],
}
HARMLESS = {
    "pack_text_tokens": 4096,
    "tokens_per_second": 3.0,
    "tokenizer": {"path": None, "silence_token": "<|silence|>", "special_tokens": ["<|eot|>"]},
    "key": "sample-1",
    "page": "https://example.org/a:b@c",
    "url": None,
    "init": "hf_checkpoints/llama",
}


def test_secrets_are_hidden_and_the_rest_is_kept():
    hidden = redact(SECRETS)
    assert hidden["tracking"] == {"wandb_api_key": HIDDEN, "entity": "lab", "password": HIDDEN}
    assert [hidden[name] for name in ("hf_token", "auth_token", "token")] == [HIDDEN] * 3
    assert hidden["mirror"] == f"https://{HIDDEN}@example.org/simple"
    assert hidden["environment"] == ["PATH=/bin", HIDDEN]
    assert hidden["nested"] == [{"client_secret": HIDDEN}]
    assert redact(HARMLESS) == HARMLESS
    assert SECRETS["token"] == "abc"  # the configuration itself is not touched


def test_provenance_is_json_and_says_what_ran():
    provenance = collect_provenance({"seed": 1} | SECRETS, tokenizer_fingerprint="f00")
    text = json.dumps(provenance)
    assert "hunter2" not in text
    assert provenance["config"]["seed"] == 1
    assert provenance["tokenizer_fingerprint"] == "f00"
    assert {"torch", "megatron-core", "safetensors"} <= set(provenance["versions"])


def test_the_revision_is_that_of_the_source_tree():
    git = git_revision()
    assert git is None or (len(git["revision"]) == 40 and isinstance(git["modified"], bool))
