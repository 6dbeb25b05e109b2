"""The writer behind an OpenAI-compatible endpoint: what it asks, pays for, keeps, and survives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from caption_cases import files
from chat_server import PLAN, answer, serve

from moss_train.cli import main
from moss_train.errors import ConfigError, DataError
from moss_train.synthesis.chat_client import EndpointOptions
from moss_train.synthesis.command import Mix, SynthOptions, synth

KEY = "sk-test-0123456789abcdef"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def options(server, videos: Path, out: str = "out", mix: Mix | None = None, **changed) -> SynthOptions:
    endpoint = {"concurrency": 3, "timeout_s": 20.0, "retries": 3}
    for name in list(changed):
        if name in EndpointOptions.__dataclass_fields__:
            endpoint[name] = changed.pop(name)
    return SynthOptions(
        source="activitynet",
        captions=str(videos / "captions.json"),
        media_root=str(videos / "media"),
        out=str(videos / out),
        writer="endpoint",
        mix=mix or Mix(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        endpoint=EndpointOptions(
            base_url=server.url, model="small", api_key_env="TEST_KEY", cache=str(videos / "cache"), **endpoint
        ),
        **changed,
    )


def samples(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_a_model_plans_answers_and_revises(server, videos):
    server.gather = 3
    made = synth(options(server, videos, price_in=1.0, price_out=2.0))
    assert (made["samples"], made["questions"], made["answers"], made["revisions"]) == (6, 6, 6, 12)
    # plan, first answer, two revisions for each of six videos
    usage = made["usage"]
    assert (usage["requests"], usage["cached"], len(server.prompts)) == (24, 0, 24)
    assert usage["cost"] == pytest.approx(24 * (100 * 1.0 + 10 * 2.0) / 1e6) and usage["tokens_in"] == 2400
    assert server.most_running == 3  # as many videos at a time as `concurrency`, and no more
    assert server.bodies[0]["response_format"] == {"type": "json_object"} and server.bodies[0]["model"] == "small"
    assert server.keys == {f"Bearer {KEY}"}
    for sample in samples(videos / "out"):
        told = [(event["t"], event.get("kind", "ask"), event["text"]) for event in sample["events"]]
        assert told[0][:2] == (1.2, "ask") and told[1][0] == 3.0 and told[1][2].startswith("A man opens box 1")
        assert told[2:] == [(7.0, "revise", "He takes a hammer."), (9.0, "revise", "He drops the hammer.")]
        assert sample["source_metadata"]["synthesis"]["model"] == "small"
    # a prompt for an answer holds no later caption
    firsts = [prompt for prompt in server.prompts if "stay silent" in prompt]
    assert len(firsts) == 6 and not any("hammer" in prompt for prompt in firsts)
    # the key is in no file, the cache included
    assert not any(KEY.encode() in path.read_bytes() for path in videos.rglob("*") if path.is_file())


def test_what_was_answered_is_not_asked_again(server, videos):
    synth(options(server, videos, "a"))
    asked = len(server.prompts)
    made = synth(options(server, videos, "b"))
    assert len(server.prompts) == asked and made["usage"]["cached"] == asked and made["usage"]["requests"] == 0
    assert files(videos / "a").keys() == files(videos / "b").keys()
    assert samples(videos / "a") == samples(videos / "b")
    synth(options(server, videos, "c", temperature=0.7))  # another setting, other answers
    assert len(server.prompts) == 2 * asked
    assert synth(options(server, videos, "b")) is None  # up to date


def test_another_server_gives_other_answers(server, videos):
    """Whose model may have the same name. The password in an address is no part of it."""
    synth(options(server, videos, "a", limit=1))
    asked = len(server.prompts)
    with serve() as other:
        other.answer = lambda prompt: answer(prompt).replace("opens", "shuts")
        made = synth(options(other, videos, "b", limit=1))
        assert made["usage"]["cached"] == 0 and len(other.prompts) == asked
    assert samples(videos / "a") != samples(videos / "b")
    first, second = (
        EndpointOptions(base_url=f"https://{user}@host/v1/").settings() for user in ("me:first", "you:second")
    )
    assert first == second and first["base_url"] == "https://[hidden]@host/v1"


def test_a_busy_or_broken_server_is_asked_again(server, videos):
    server.faults.extend([429, 500, 503, 429])
    made = synth(options(server, videos))
    assert made["samples"] == 6 and made["usage"]["retries"] == 4 and made["usage"]["requests"] == 24


def test_a_server_that_stays_away_stops_the_run_and_what_is_written_stays(server, videos):
    synth(options(server, videos, "whole"))
    for path in (videos / "cache").rglob("*.json"):
        path.unlink()
    server.prompts.clear()
    server.faults.extend([None] * 8 + [503] * 40)  # 8 requests: at least the first video is whole
    with pytest.raises(DataError, match="gave no answer in 3 tries .*HTTP 503.*run again to go on") as caught:
        synth(options(server, videos, concurrency=1, retries=2))
    assert KEY not in str(caught.value) and not (videos / "out").exists()
    server.faults.clear()
    made = synth(options(server, videos))
    assert made["samples"] == 6
    assert made["usage"]["requests"] == 16 and made["usage"]["cached"] == 0  # two videos were written before
    assert samples(videos / "out") == samples(videos / "whole")


@pytest.mark.parametrize("garbage", ["I am sorry.", "[]", '{"questions": []}', '{"questions": [{"t": "soon"}]}', ""])
def test_garbage_is_sent_back_and_mended(server, videos, garbage):
    server.faults.append(garbage)
    made = synth(options(server, videos, limit=1))
    assert made["samples"] == 1 and made["usage"]["repairs"] == 1
    assert "not of the asked form" in server.prompts[1]


def test_a_video_about_which_only_garbage_comes_is_left_out_with_the_reason(server, videos):
    server.answer = lambda prompt: answer(prompt) if "13." in prompt else "garbage"
    made = synth(options(server, videos))
    assert made["samples"] == 1 and made["rejected_videos"] == 5
    assert made["reasons"] == {"video: bad_answer": 5}
    rejected = [json.loads(line) for line in (videos / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rejected] == ["bad_answer"] * 5 and "after 3 tries" in rejected[0]["detail"]
    # garbage is not kept: the next run asks again
    before = len(server.prompts)
    server.answer = answer
    assert synth(options(server, videos, "again"))["samples"] == 6 and len(server.prompts) > before


def test_leaks_and_clocks_of_a_model_are_left_out(server, videos):
    def leaks(prompt: str) -> str:
        if "stay silent" in prompt:
            return '{"action": "answer", "text": "He will need a hammer."}'
        if "question(s)" in prompt:
            return PLAN.replace(
                "]}", ', {"t": 8.0, "text": "What now?"}, {"t": 9.5, "text": "What was that at 0:02?"}]}'
            )
        return answer(prompt)

    server.answer = leaks
    made = synth(options(server, videos, limit=1))
    assert made["reasons"] == {"answer: leak": 1, "question: clock": 1}
    assert (made["questions_planned"], made["questions"], made["rejected_questions"]) == (3, 1, 2)
    (sample,) = samples(videos / "out")
    assert [event["text"] for event in sample["events"]] == ["What now?", "He will need a hammer."]


def test_the_password_of_an_address_is_in_no_message(server, videos):
    server.faults.extend([503, 503, 404])
    told = []
    for retries in (1, 0):
        asked = options(server, videos, limit=1, retries=retries)
        asked.endpoint.base_url = server.url.replace("http://", "http://me:geheim@")
        with pytest.raises((DataError, ConfigError)) as raised:
            synth(asked)
        told.append(str(raised.value))
    with pytest.raises(ConfigError) as raised:
        EndpointOptions(base_url="ftp://me:geheim@host/v1", model="m", api_key_env=None).validate()
    told.append(str(raised.value))
    assert "gave no answer" in told[0] and "check endpoint.base_url" in told[1] and "must start with" in told[2]
    assert all("://[hidden]@" in text and "geheim" not in text for text in told)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [(401, ConfigError, "api_key_env"), (404, ConfigError, "endpoint.model"), (400, DataError, "refused")],
)
def test_what_no_retry_mends(server, videos, status, error, message):
    server.faults.extend([status] * 20)
    with pytest.raises(error, match=message) as caught:
        synth(options(server, videos, retries=1))
    assert KEY not in str(caught.value)


def test_a_limit_of_cost_stops_the_run_and_a_higher_one_goes_on(server, videos):
    with pytest.raises(DataError, match="max_cost"):
        synth(options(server, videos, price_in=1e4, max_cost=6.5, concurrency=1))  # 1 a request
    assert len(server.prompts) == 7
    assert synth(options(server, videos, price_in=1e4, max_cost=100.0))["samples"] == 6
    assert len(server.prompts) == 24  # what was asked for the second video before the stop came from disk


def test_a_killed_run_goes_on_where_it_was(server, videos):
    server.stall_after = 14
    arguments = [
        "data", "synth", "source=activitynet", f"captions={videos / 'captions.json'}", f"media_root={videos / 'media'}",
        f"out={videos / 'out'}", "writer=endpoint", f"endpoint.base_url={server.url}", "endpoint.model=small",
        "endpoint.api_key_env=TEST_KEY", "endpoint.concurrency=1", f"endpoint.cache={videos / 'cache'}",
        "mix.during=1", *(f"mix.{name}=0" for name in Mix.__dataclass_fields__ if name != "during"),
    ]  # fmt: skip
    run = subprocess.Popen([sys.executable, "-m", "moss_train", *arguments], stdout=subprocess.DEVNULL)
    unfinished = videos / "out.unfinished"
    try:
        until = time.monotonic() + 30
        while len(list(unfinished.glob("*.json"))) < 3 or server.running == 0:
            assert time.monotonic() < until and run.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    server.stall_after = None
    server.released.set()
    while server.running:  # the request that was under way comes to its end unheard
        time.sleep(0.01)
    # as a kill in the middle of a line would leave it
    with (unfinished / "outcomes.jsonl").open("a") as ledger:
        ledger.write('{"key": "captions-0000')
    (unfinished / "captions-000003.mp4").write_bytes(b"half")
    before = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.json")}
    for path in (videos / "cache").rglob("*.json"):
        path.unlink()  # so that what is asked again shows
    asked = len(server.prompts)
    assert main(arguments) == 0
    assert len(server.prompts) - asked == 12  # three videos, four requests each
    out = videos / "out"
    assert len(samples(out)) == 6 and not unfinished.exists()
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert (out / "captions-000003.mp4").read_bytes() == b"video\x03"
    assert {path.name for path in out.iterdir() if path.suffix == ".jsonl"} == {"synth.jsonl"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": None}, "endpoint.model"),
        ({"base_url": "localhost"}, "base_url"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE"),
        ({"max_cost": 1.0}, "price_in"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_s": 0.0}, "timeout_s"),
    ],
)
def test_settings_of_the_endpoint_are_checked(changed, message):
    with pytest.raises(ConfigError, match=message):
        EndpointOptions(**({"model": "small", "api_key_env": None} | changed)).validate()


def test_a_key_with_a_line_break_is_sent_without_it_and_never_shown(server, videos, monkeypatch):
    """The HTTP library quotes a header that it refuses, so a key read from a file must not come to it as it is."""
    monkeypatch.setenv("TEST_KEY", KEY + "\r\n")
    synth(options(server, videos))
    assert server.keys == {f"Bearer {KEY}"}
    for key in (f"{KEY}\n{KEY}", KEY + "…"):
        monkeypatch.setenv("TEST_KEY", key)
        with pytest.raises(ConfigError, match="TEST_KEY") as raised:
            synth(options(server, videos, out="other"))
        assert KEY not in str(raised.value)


def test_prompts_of_ones_own(server, videos):
    from moss_train.synthesis.endpoint import SHIPPED_PROMPTS

    own = videos / "prompts.yaml"
    own.write_text(SHIPPED_PROMPTS.read_text().replace("You write training dialogues", "You write short dialogues"))
    synth(options(server, videos, limit=1, prompts=str(own)))
    assert "short dialogues" in server.bodies[0]["messages"][0]["content"]
    own.write_text("system: only this")
    with pytest.raises(ConfigError, match="has no plan"):
        synth(options(server, videos, "b", prompts=str(own)))
    own.write_text(SHIPPED_PROMPTS.read_text().replace("Question: $question", "Question: $qestion"))
    with pytest.raises(ConfigError, match="qestion"):
        synth(options(server, videos, "c", prompts=str(own)))
