import json
from pathlib import Path

import pytest
from chat_server import serve


@pytest.fixture
def server():
    with serve() as running:
        yield running


@pytest.fixture
def videos(tmp_path) -> Path:
    """A folder with captions of six videos in the form of ActivityNet, and their files."""
    media = tmp_path / "media"
    media.mkdir()
    entries = {}
    for number in range(6):
        name = f"v_{number}"
        (media / f"{name}.mp4").write_bytes(b"video" + bytes([number]))
        entries[name] = {
            "duration": 12.0,
            "timestamps": [[0.0, 2.5], [3.0, 6.5], [6.0, 9.0]],
            "sentences": [f"A man opens box {number + 10}.", "He takes a hammer.", "He drops the hammer."],
        }
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    return tmp_path
