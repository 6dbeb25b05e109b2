"""Public benchmarks from small hand-made files in the forms in which they are published."""

import json

import numpy as np
import pytest
import torch
from scripted_model import shipped_tokenizer
from small_model import SIZE, small_model

from moss_train.data.synthetic.render import write_video
from moss_train.errors import DataError
from moss_train.evaluate.benchmarks import (
    load_proactive,
    load_probes,
    proactive_items,
    probe_items,
    seconds_of,
)
from moss_train.evaluate.config import DecodeConfig, EvaluationConfig
from moss_train.evaluate.file_corpus import FileCorpus, FileItem
from moss_train.evaluate.judges import TextJudge
from moss_train.evaluate.metrics.benchmarks import ProbeAnswer, ovo_figures, proactive_figures
from moss_train.evaluate.metrics.replies import StreamReplies
from moss_train.evaluate.offline import prepare_conversations, run_conversations
from moss_train.evaluate.prepared import prepare_streams
from moss_train.evaluate.runner import result_of, run_streams
from moss_train.parallel import groups
from moss_train.streams.config import CompilerConfig

TOKENIZER = shipped_tokenizer()
COMPILER = CompilerConfig(tokens_per_second=8.0)

PROACTIVE = [
    {
        "video_path": "./data/sample_1.mp4",
        "questions": [
            {
                "task_type": "Proactive Output",
                "question": 'When the screen turns red, output "Red".',
                "time_stamp": "00:00:01",
                "ground_truth_time_stamp": "00:00:04",
                "ground_truth_output": "Red",
            },
            {
                "question": "Say blue.", "time_stamp": "2", "ground_truth_time_stamp": "11",
                "ground_truth_output": "Blue",
            },
        ],
    },
    {
        "video_path": "absent.mp4",
        "questions": [
            {"question": "x", "time_stamp": "0", "ground_truth_time_stamp": "1", "ground_truth_output": "y"}
        ],
    },
]  # fmt: skip

OVO = [
    {
        "id": 7, "task": "EPM", "video": "sample_1.mp4", "realtime": 5, "question": "What was it?",
        "options": ["a cat", "a dog", "Unable to answer"], "gt": 1,
    },
    {
        "id": 8, "task": "REC", "video": "src/sample_1.mp4", "activity": "jump",
        "test_info": [{"realtime": 3, "count": 0}, {"realtime": 9.5, "count": 2}],
    },
    {
        "id": 9, "task": "SSR", "video": "sample_1", "tutorial": "tea",
        "test_info": [{"realtime": 4, "step": "boil water", "type": 1}],
    },
    {
        "id": 10, "task": "CRR", "video": "sample_1", "question": "Who wins?", "answer": "Red", "ask_time": 1,
        "clue_time": 8, "test_info": [{"realtime": 4, "type": 0}, {"realtime": 8, "type": 1}],
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with one video of 12 s that gets brighter."""
    folder = tmp_path_factory.mktemp("videos")
    shades = np.linspace(0, 255, 48).astype(np.uint8)
    write_video(folder / "sample_1.mp4", np.broadcast_to(shades[:, None, None, None], (48, 32, 32, 3)), 4.0)
    return folder


@pytest.fixture(scope="module")
def model():
    yield small_model(TOKENIZER)
    groups.shutdown()


def written(folder, name, rows):
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


def test_times():
    assert [seconds_of(text) for text in ("75", "1.5", "01:15", "1:01:15.5")] == [75.0, 1.5, 75.0, 3675.5]
    for text in ("", "a", "-3", "1:2:3:4", "nan"):
        with pytest.raises(ValueError):
            seconds_of(text)


def test_proactive_questions_as_published(media, tmp_path):
    first, second, third = load_proactive(written(tmp_path, "q.json", PROACTIVE), media)
    assert (first.asked_s, first.answer_s, first.answer) == (1.0, 4.0, "Red")
    assert first.video == second.video == media / "sample_1.mp4" and not third.video.exists()
    assert len({one.key for one in (first, second, third)}) == 3
    table = (
        "question_id,task_type,question,time_stamp,ground_truth_time_stamp,ground_truth_output\n"
        'Proactive Output_sample_1_1,Proactive Output,"When red, say so",0:00:01,0:00:04,Red\n'
    )
    (row,) = load_proactive(written(tmp_path, "q.csv", table), media)
    assert (row.video, row.question, row.answer_s) == (media / "sample_1.mp4", "When red, say so", 4.0)


def test_the_stream_runs_from_the_beginning_to_the_last_poll(media, tmp_path):
    questions = load_proactive(written(tmp_path, "q.json", PROACTIVE), media)
    corpus = FileCorpus(proactive_items(questions, COMPILER, "Watch."), SIZE)
    prepared = prepare_streams(corpus, TOKENIZER, COMPILER)
    first, second = prepared.items
    assert "absent.mp4" in next(iter(prepared.skipped.values()))
    frames = [slot.time_s for slot in first.transcript.slots if not slot.opens_turn]
    assert frames == list(range(9))  # the ground truth's time is 4 s, the last poll 8 s
    assert [slot.time_s for slot in second.transcript.slots if not slot.opens_turn][-1] == 11.0  # the video's end
    assert first.schedule.system == "Watch."
    (question,) = first.transcript.questions
    assert question.evidence_after and first.transcript.slots[question.answer_slot].time_s == 4.0
    short = CompilerConfig(max_frames=4, tokens_per_second=8.0)
    late = prepare_streams(FileCorpus(proactive_items(questions, short, None), SIZE), TOKENIZER, short).items[0]
    assert [slot.time_s for slot in late.transcript.slots] == [5.0, 5.0, 6.0, 7.0, 8.0]  # asked when it begins


def test_a_model_is_asked_proactively(model, media, tmp_path):
    questions = load_proactive(written(tmp_path, "q.json", PROACTIVE), media)
    prepared = prepare_streams(FileCorpus(proactive_items(questions, COMPILER, None), SIZE), TOKENIZER, COMPILER)
    config = EvaluationConfig()
    run = run_streams(model, prepared, TOKENIZER, config, DecodeConfig())
    result = result_of(prepared, [run], TextJudge(), config)
    assert result.figures["n_questions"] == 2 and result.figures["n_skipped"] == 1
    perfect = [StreamReplies.of(transcript.as_reference()) for transcript in result.transcripts]
    assert set(proactive_figures(perfect, 1.0).values()) == {1.0}
    said = [StreamReplies.of(transcript) for transcript in result.transcripts]
    assert proactive_figures(said, 1.0)["proactive_accuracy"] == 0.0  # its words are noise


def test_probes_as_published(media, tmp_path):
    probes = load_probes(written(tmp_path, "ovo.json", OVO), media)
    assert [(one.task, one.time_s, one.answer) for one in probes] == [
        ("EPM", 5.0, "B"), ("REC", 3.0, "0"), ("REC", 9.5, "2"), ("SSR", 4.0, "yes"), ("CRR", 4.0, "no"),
        ("CRR", 8.0, "yes"),
    ]  # fmt: skip
    assert {one.video for one in probes} == {media / "sample_1.mp4"} and len({one.key for one in probes}) == 6
    assert "B. a dog" in probes[0].prompt and "jump" in probes[1].prompt and "boil water" in probes[3].prompt
    rows = 'task,video,realtime,question,options,gt\nOCR,sample_1,6,What?,"[""x"", ""y""]",A\n'
    (flat,) = load_probes(written(tmp_path, "ovo.csv", rows), media)
    assert (flat.task, flat.answer, flat.time_s) == ("OCR", "A", 6.0)


def test_a_model_is_probed_with_what_was_shown_so_far(model, media, tmp_path):
    probes = load_probes(written(tmp_path, "ovo.json", OVO), media)
    prepared = prepare_conversations(FileCorpus(probe_items(probes, None), SIZE), TOKENIZER, COMPILER)
    times = [[request.time_s for request in item.compiled.frames] for item in prepared.items]
    assert [len(own) for own in times] == [5, 3, 10, 4, 4, 8] and max(times[1]) < 3.0
    assert torch.equal(
        prepared.frames_of(prepared.items[0].compiled.key)[:3], prepared.frames_of(prepared.items[1].compiled.key)
    )
    run = run_conversations(model, prepared, TOKENIZER, EvaluationConfig(answer_tokens=4))
    answers = [ProbeAnswer(one.key, one.kind, one.said, one.reference) for one in run.answers]
    assert ovo_figures(answers)["n_probes"] == 6
    right = [ProbeAnswer(one.key, one.kind, f"It is {one.reference}.", one.reference) for one in run.answers]
    assert ovo_figures(right)["ovo_total"] == 1.0


@pytest.mark.parametrize(
    ("load", "rows", "message"),
    [
        (load_proactive, [{"question": "x"}], "rows.json row 1: time_stamp is missing"),
        (load_proactive, [{"time_stamp": "soon", "ground_truth_time_stamp": "1"}], "time_stamp='soon' is no time"),
        (load_proactive, [{"time_stamp": "5", "ground_truth_time_stamp": "1"}], "before the question's 5 s"),
        (load_probes, [{"task": "XYZ"}], "row 1: task='XYZ': legal values are EPM"),
        (load_probes, [{"task": "EPM", "options": ["a"], "gt": 0}], "options must be a list of 2 to 8"),
        (load_probes, [{"task": "EPM", "options": ["a", "b"], "gt": 2}], "gt='2' is neither"),
        (load_probes, [{"task": "CRR", "question": "x", "type": 2}], "type=2: must be 0"),
        (load_probes, [{"task": "REC", "activity": "x", "count": "many"}], "count='many' is no whole number"),
        (load_probes, {"a": [], "b": []}, "holds no list of annotations"),
        (load_probes, "{", "cannot be read"),
    ],
)
def test_faulty_annotations_are_named(tmp_path, load, rows, message):
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        load(written(tmp_path, "rows.json", rows), tmp_path)


def test_a_still_and_a_text_are_no_videos(media, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.mp4").write_text("x")
    items = [FileItem(name, tmp_path / name, lambda duration_s: {}) for name in ("a.txt", "b.mp4")]
    skipped = {}
    corpus = FileCorpus(items, SIZE)
    for number in range(len(corpus)):
        with pytest.raises(Exception) as error:
            corpus.sample(number)
        skipped[corpus.key(number)] = str(error.value)
    assert "not one of mp4" in skipped["a.txt"] and "b.mp4" in skipped["b.mp4"]
