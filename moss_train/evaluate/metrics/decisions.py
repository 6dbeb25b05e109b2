"""Speak or stay silent: per slot, per reply, and when to stop."""

from collections.abc import Iterable, Sequence

from moss_train.evaluate.metrics.replies import StreamReplies, mean, ratio
from moss_train.evaluate.transcript import StreamTranscript


def decision_figures(transcripts: Iterable[StreamTranscript]) -> dict[str, float]:
    """Precision, recall and F1 of speaking, F1 of silence and balanced accuracy over all scored slots.

    A slot of the reference speaks iff its state is "speak" or "continue", one of the model iff it says any text in it.
    Slots whose reference is "unknown" are not scored. All streams' slots count alike (micro average), because single
    streams hold too few replies.
    """
    both = silent = missed = false = 0
    for transcript in transcripts:
        for slot in transcript.slots:
            if slot.reference_state == "unknown":
                continue
            if slot.reference_speaks:
                both += slot.speaks
                missed += not slot.speaks
            else:
                false += slot.speaks
                silent += not slot.speaks
    return {
        "speak_precision": ratio(both, both + false),
        "speak_recall": ratio(both, both + missed),
        "speak_f1": ratio(2 * both, 2 * both + missed + false),
        "silence_precision": ratio(silent, silent + missed),
        "silence_recall": ratio(silent, silent + false),
        "silence_f1": ratio(2 * silent, 2 * silent + missed + false),
        "balanced_accuracy": (ratio(both, both + missed) + ratio(silent, silent + false)) / 2,
        "n_slots": both + silent + missed + false,
    }


def slot_errors(transcript: StreamTranscript) -> list[bool]:
    """Per slot, whether the model spoke where the reference is silent or the other way round."""
    return [slot.reference_state != "unknown" and slot.speaks != slot.reference_speaks for slot in transcript.slots]


def matched_onsets(said_s: Sequence[float], reference_s: Sequence[float], tolerance_s: float) -> list[tuple[int, int]]:
    """The largest one-to-one matching of two ascending lists of times with |t̂ − t| ≤ tolerance: pairs of indices.

    Taking the earliest partner that is near enough is optimal, since all tolerances are equal.
    """
    pairs, mine, theirs = [], 0, 0
    while mine < len(said_s) and theirs < len(reference_s):
        difference = said_s[mine] - reference_s[theirs]
        if abs(difference) <= tolerance_s + 1e-9:
            pairs.append((mine, theirs))
            mine, theirs = mine + 1, theirs + 1
        elif difference < 0:
            mine += 1
        else:
            theirs += 1
    return pairs


def trigger_figures(streams: Iterable[StreamReplies], tolerance_s: float) -> dict[str, float]:
    """Trigger-F1@Δ, Δ = `tolerance_s`: beginnings of replies, matched one to one, whatever the replies say.

    Precision is matched / all of the model's, recall matched / all of the reference's, over all streams. The stop error
    is how many tokens more the model says than the reference in a matched reply; replies of the reference that are cut
    off do not count for it.
    """
    matched = said = reference = 0
    errors: list[float] = []
    for stream in streams:
        times_s = [[stream.time_s(reply.slot) for reply in side] for side in (stream.said, stream.reference)]
        pairs = matched_onsets(times_s[0], times_s[1], tolerance_s)
        matched, said, reference = matched + len(pairs), said + len(stream.said), reference + len(stream.reference)
        for mine, theirs in pairs:
            if stream.reference[theirs].complete:
                errors.append(stream.said[mine].tokens - stream.reference[theirs].tokens)
    return {
        "trigger_precision": ratio(matched, said),
        "trigger_recall": ratio(matched, reference),
        "trigger_f1": ratio(2 * matched, said + reference),
        "stop_error_tokens": mean(errors),
        "stop_error_abs_tokens": mean([abs(error) for error in errors]),
    }
