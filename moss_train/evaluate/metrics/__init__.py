"""Figures of streaming behaviour, pure functions of transcripts; `docs/evaluation.md` has formulas and worked examples.

By subject: `decisions` (speak or be silent, and when to stop), `timing` (LiveStar; lag of a live stream), `language`
(VideoLLM-online), `revision` (answers and what becomes of them), `benchmarks` (StreamingBench, MMDuet, OVO-Bench).
"""

from collections.abc import Sequence

from moss_train.evaluate.judges import Judge, TextJudge
from moss_train.evaluate.metrics.benchmarks import proactive_figures, span_figures
from moss_train.evaluate.metrics.decisions import decision_figures, slot_errors, trigger_figures
from moss_train.evaluate.metrics.language import language_figures
from moss_train.evaluate.metrics.replies import StreamReplies
from moss_train.evaluate.metrics.revision import answer_figures
from moss_train.evaluate.metrics.timing import segment_figures
from moss_train.evaluate.transcript import StreamTranscript

__all__ = [
    "OFFLINE",
    "OFFLINE_SILENT",
    "TEACHER_FORCED",
    "figure_names",
    "slot_errors",
    "streaming_figures",
    "teacher_forced_figures",
]

TEACHER_FORCED = "teacher_forced"  #: stands before the names of teacher-forced figures
OFFLINE, OFFLINE_SILENT = "offline_accuracy", "offline_silent_rate"


def streaming_figures(
    transcripts: Sequence[StreamTranscript], judge: Judge, window_frames: int = 2, tolerance_s: float = 1.0
) -> dict[str, float]:
    """All figures of what a set of transcripts says and when. One without items is NaN.

    `window_frames`: how many frames late an answer or a revision still counts; `tolerance_s`: Δ of the trigger F1.
    """
    streams = [StreamReplies.of(transcript) for transcript in transcripts]
    return {
        "n_streams": len(streams),
        **decision_figures(transcripts),
        **answer_figures(streams, judge, window_frames),
        **trigger_figures(streams, tolerance_s),
        **segment_figures(streams),
        **span_figures(streams, judge),
        **proactive_figures(streams),
    }


def teacher_forced_figures(
    transcripts: Sequence[StreamTranscript], judge: Judge, window_frames: int = 2, tolerance_s: float = 1.0
) -> dict[str, float]:
    """The same of teacher-forced transcripts, and VideoLLM-online's figures, which need them."""
    return streaming_figures(transcripts, judge, window_frames, tolerance_s) | language_figures(transcripts)


def figure_names() -> list[str]:
    """The names of all figures of an evaluation during training."""
    forced = [f"{TEACHER_FORCED}/{name}" for name in teacher_forced_figures([], TextJudge())]
    return [*streaming_figures([], TextJudge()), *forced, OFFLINE, OFFLINE_SILENT]
