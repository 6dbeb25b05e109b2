"""Writes the JSON Schema of the three kinds of sample: `python -m moss_train.streams.schema_files [folder]`.

The folder is `data_specs/schemas` of the repository unless given. A schema describes the form of one kind;
the rules between fields (times, order, links) are in `rules.py` and only checked in Python.
"""

import json
import sys
from pathlib import Path

from moss_train.streams.schema import SAMPLE_TYPES

DEFAULT_FOLDER = Path(__file__).parents[2] / "data_specs" / "schemas"


def schema_texts() -> dict[str, str]:
    """File name -> content, for every kind of sample."""
    texts = {}
    for name, sample_type in SAMPLE_TYPES.items():
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": name}
        schema |= sample_type.model_json_schema(by_alias=True)
        schema["required"] = ["schema", *[field for field in schema["required"] if field != "schema"]]
        file_name = name.removeprefix("moss_train/").split("@")[0] + ".schema.json"
        texts[file_name] = json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
    return texts


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if arguments else DEFAULT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, text in schema_texts().items():
        (folder / file_name).write_text(text, encoding="utf-8")
        print(f"wrote {folder / file_name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
