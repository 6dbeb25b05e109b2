"""When it is said, in seconds of the stream, whatever is said: LiveStar's figures, and the lag of a live stream.

LiveStar (e43b65d): a *segment* is where one reply of the reference stands (`replies.Segment`), a *prediction* the
beginning of a reply of the model. TimDiff is the distance of the first prediction inside a segment from the segment's
beginning, the segment's length where there is none; redundancy is the mean of |1 − predictions in the segment|;
coverage the share of segments with a prediction.
"""

from collections.abc import Iterable, Sequence

from moss_train.evaluate.metrics.replies import StreamReplies, mean
from moss_train.evaluate.transcript import StreamTranscript


def segment_figures(streams: Iterable[StreamReplies]) -> dict[str, float]:
    """LiveStar's TimDiff, redundancy and coverage, means over the segments of all streams."""
    differences_s: list[float] = []
    surplus: list[float] = []
    covered: list[float] = []
    for stream in streams:
        for segment in stream.segments():
            predictions = stream.started(segment.first, segment.end)
            late_s = stream.time_s(predictions[0].slot) if predictions else segment.end_s
            differences_s.append(late_s - segment.start_s)
            surplus.append(abs(1 - len(predictions)))
            covered.append(bool(predictions))
    return {"tim_diff_s": mean(differences_s), "redundancy": mean(surplus), "coverage": mean(covered)}


def lag_figures(transcripts: Sequence[StreamTranscript]) -> dict[str, float]:
    """How far a live stream's words lag behind its clock, from slots with `emitted_s`.

    The lag of a slot is the wall clock's time at its first token less the slot's own time, both since the start; its
    growth is the slope of a straight line through the lags of each stream (least squares, mean over the streams with
    two or more), in seconds a second. It must be about 0: a model that is too slow falls behind for ever.
    """
    lags_s: list[float] = []
    slopes: list[float] = []
    for transcript in transcripts:
        said = [slot for slot in transcript.slots if slot.emitted_s is not None]
        points = [(slot.time_s, (slot.emitted_s or 0.0) - slot.time_s) for slot in said]
        lags_s += [lag_s for _, lag_s in points]
        times_mean, lags_mean = mean([time_s for time_s, _ in points]), mean([lag_s for _, lag_s in points])
        spread = sum((time_s - times_mean) ** 2 for time_s, _ in points)
        if spread > 0:
            slopes.append(sum((time_s - times_mean) * (lag_s - lags_mean) for time_s, lag_s in points) / spread)
    return {"emission_lag_s": mean(lags_s), "emission_lag_growth": mean(slopes)}
