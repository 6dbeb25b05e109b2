"""What the reference makes of a real-time row, written from `model_facts` C.1, C.2, C.4 and G.2 alone.

It works on the text of the sharegpt row and shares nothing with the compiler but the tokenizer's raw `encode`.
"""

import re
from dataclasses import dataclass


@dataclass
class OracleRow:
    ids: list[int]
    labels: list[int]  # already shifted: labels[t] is what position t must predict
    boundary: list[int]  # frames a token sees: cumulative count of <|image|> up to and including it
    positions: list[int]
    frame_positions: list[int]


def reference_row(row: dict, tokenizer, jitter: list[bool] | None = None) -> OracleRow:
    """`jitter[f]`: the coin of the f-th frame came up "swap" (it counts only where the collator asks)."""
    special = tokenizer.special
    names = {
        "<|begin_of_text|>": special.begin_of_text,
        "<|start_header_id|>": special.start_header,
        "<|end_header_id|>": special.end_header,
        "<|eot_id|>": special.end_of_turn,
        "<|silence|>": special.silence,
        "<|video|>": special.video,
    }
    splitter = re.compile("(" + "|".join(re.escape(name) for name in names) + ")")

    def tokenise(text: str) -> list[int]:
        ids = []
        for part in splitter.split(text):
            if part in names:
                ids.append(names[part])
            elif part:
                ids.extend(tokenizer.encode(part))
        return ids

    # C.2: chat template; prompts -100, assistant turns (with their <|eot_id|>) trained
    ids, labels = [], []

    def prompt(text: str) -> None:
        new = tokenise(text)
        ids.extend(new)
        labels.extend([-100] * len(new))

    prompt("<|begin_of_text|>")
    for message in row["messages"]:
        role, content = message["role"], message["content"]
        if role == "system":
            prompt(f"<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>")
        elif role == "user":
            prompt(
                f"<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
            )
        else:
            new = tokenise(content + "<|eot_id|>")
            ids.extend(new)
            labels.extend(new)

    # C.4: arrival jitter, before expansion; a swapped frame moves behind the loop and is not met again
    frame = -1
    for i in range(len(ids)):
        if ids[i] != special.video:
            continue
        frame += 1
        if jitter is None or i < 2 or not jitter[frame]:
            continue
        if ids[i - 1] != special.silence and ids[i - 2] not in (special.end_header, special.video):
            ids[i - 1], ids[i] = ids[i], ids[i - 1]
            labels[i - 1], labels[i] = labels[i], labels[i - 1]

    # C.4: expand <|video|> (one frame each in a real-time row), label -100; the turn end is external
    image = special.anchor
    labels = [-100 if token == special.video else label for token, label in zip(ids, labels, strict=True)]
    ids = [image if token == special.video else token for token in ids]
    labels = [-100 if label == special.end_of_turn else label for label in labels]

    boundary, seen = [], 0
    for token in ids:
        seen += token == image
        boundary.append(seen)
    return OracleRow(
        ids=ids,
        labels=labels[1:] + [-100],
        boundary=boundary,
        positions=list(range(len(ids))),
        frame_positions=[i for i, token in enumerate(ids) if token == image],
    )
