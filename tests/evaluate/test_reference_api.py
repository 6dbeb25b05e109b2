"""The reference's calls: queues in, text and signal strings out."""

import queue
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from scripted_model import shipped_tokenizer
from small_model import SIZE, small_model

from moss_train.data.collate import collate
from moss_train.errors import ConfigError
from moss_train.evaluate.query import Query
from moss_train.evaluate.reference_api import ReferenceApi, StreamProcessor
from moss_train.evaluate.stream import LiveConfig
from moss_train.parallel import groups
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import parse_sample

TOKENIZER = shipped_tokenizer()
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def model():
    yield small_model(TOKENIZER, layers=3)
    groups.shutdown()


def heard(tokens: queue.Queue, last: str) -> list[str]:
    items = []
    while not items or items[-1] != last:
        items.append(tokens.get(timeout=PATIENCE_S))
    return items


def test_real_time(model):
    api, images, prompts, tokens = ReferenceApi(model), queue.Queue(), queue.Queue(), queue.Queue()
    processor = StreamProcessor(TOKENIZER, CompilerConfig(), live=LiveConfig(silence_after_prompt=True, slot_tokens=6))
    arguments = (images, prompts, tokens, processor)
    more = {"do_sample": True, "temperature": 3.0, "seed": 1}
    thread = threading.Thread(target=api.real_time_generate, args=arguments, kwargs=more, daemon=True)
    thread.start()
    prompts.put("What is it?")
    assert heard(tokens, "<|silence|>") == ["<|round_start|>", "<|silence|>"], "silence is forced after a prompt"
    for shade in range(4):
        images.put(Image.new("RGB", (40, 30), (60 * shade, 0, 0)))
        said = heard(tokens, "<|silence|>")
    assert all(isinstance(item, str) and item for item in said)
    api.stop_real_time_generate()
    assert heard(tokens, "[DONE]")
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_real_time_ends_and_fails_as_the_reference_does(model):
    chatty = StreamProcessor(TOKENIZER, CompilerConfig(), live=LiveConfig(paced=False, silence_after_prompt=False))
    api, images, prompts, tokens = ReferenceApi(model), queue.Queue(), queue.Queue(), queue.Queue()
    prompts.put("Talk.")
    for _ in range(20):
        images.put(np.zeros((SIZE, SIZE, 3), np.uint8))
    api.real_time_generate(images, prompts, tokens, chatty, max_new_tokens=1, do_sample=True, temperature=9.0)
    items = heard(tokens, "[DONE]")
    assert items[-2] == "<|round_end|>" and sum(not item.startswith(("<|", "[")) for item in items) <= 1
    images.put("no picture")
    with pytest.raises(RuntimeError, match="the live session broke"):
        api.real_time_generate(images, prompts, tokens, chatty)
    assert heard(tokens, "[ERROR]")
    with pytest.raises(ConfigError, match="repetition_penalty"):
        api.real_time_generate(images, prompts, tokens, chatty, repetition_penalty=1.2)


def test_offline_signals_and_queries(model):
    api, queries, out = ReferenceApi(model), queue.Queue(), queue.Queue()
    processor = StreamProcessor(TOKENIZER, systems={"video": "Watch."})
    frames = [Image.new("RGB", (SIZE, SIZE), (40 * number, 90, 0)) for number in range(5)]
    settings = {"do_sample": False, "max_new_tokens": 4}
    queries.put({"prompt": "What?", "videos": [frames], "generate_kwargs": settings, "system_prompt_type": "video"})
    queries.put({"prompt": "First <|image|> and <|image|> then?", "images": frames[:2], "generate_kwargs": settings})
    queries.put({"stop_offline_generate": True})
    api.offline_generate(processor, queries, out, vision_chunked_length=2)
    items = heard(out, "[DONE]")
    assert items.count("<|round_start|>") == items.count("<|round_end|>") == 2 and items[0] == "<|round_start|>"
    for query, message in (
        ({"prompt": "<|image|>?"}, "name each in its place"),
        ({"propmt": "?"}, "no such key propmt"),
        ({"prompt": "?", "thinking_mode": "deep"}, "thinking_mode"),
        ({"prompt": "?", "generate_kwargs": {"beams": 2}}, "beams"),
    ):
        queries.put(query)
        with pytest.raises(ConfigError, match=message):
            api.offline_generate(processor, queries, out)
        assert heard(out, "[ERROR]")


@pytest.mark.parametrize("compiler", [CompilerConfig(), CompilerConfig(window=2, sinks=1, text_window=9, text_sinks=4)])
def test_a_query_is_the_row_of_a_conversation(model, compiler):
    """fp32, 2e-5: the first logits of the answer are those of the compiled conversation, teacher-forced."""
    sample = {
        "schema": "moss_train/conversation@1",
        "id": "c",
        "media": [{"id": "v", "kind": "video", "member": "mp4"}],
        "system": "Watch.",
        "messages": [
            {"role": "user", "content": "Look: <|video|> what is it?"},
            {"role": "assistant", "content": "It is red."},
        ],
    }
    parsed = parse_sample(sample, "c")
    compiled = compile_sample(parsed, {"v": MediaInfo(6.0, 1.0, 6)}, TOKENIZER, compiler, np.random.default_rng(0))
    frames = torch.randint(0, 256, (len(compiled.frames), 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model(collate([[(compiled, frames)]]))[:, 0]
    at = int(np.flatnonzero(compiled.labels != -100)[0])
    query = Query(model, TOKENIZER, compiler, ["Look: ", frames, " what is it?"], "Watch.")
    torch.testing.assert_close(query.read(frames_at_once=4), expected[at], atol=2e-5, rtol=0)
