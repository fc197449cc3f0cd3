"""Two hundred chats with all that storage could change, and a writer for each form of storage."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features

from chats.template_helpers import template_tokenizer
from helpers import write_jsonl
from phinetune.chats.encoder import ChatEncoder, make_encoder

Rows = list[dict[str, Any]]

# Takes tools, calls and an answer's reasoning.
TEMPLATE = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' }}"
    "{% if loop.first and tools %}{{ tools | tojson }}{% endif %}"
    "{% if m.reasoning_content %}{{ '<think>' ~ m.reasoning_content ~ '</think>' }}{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}, "zone": {"type": "string"}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
]
# Unlike arguments: absent, null, empty, nested, lists, whole and other numbers, true and false.
ARGUMENTS: list[Any] = [
    {"city": "Rome"},
    {"city": "Oslo", "days": 5},
    {"city": "Bern", "days": 3, "zone": "CET"},
    {"city": "Kyiv", "zone": None},
    {},
    {"where": {"lat": 41.5, "near": {"name": "Röm"}}},
    {"city": "Zürich", "lang": ["de", ""], "metric": True},
    {"metric": False, "limits": [{"from": 1.5}, {"to": 2.25}]},
]
# A call as JSON text, which no storage changes.
AS_TEXT = json.dumps({"name": "weather", "arguments": {"zone": None, "days": 2.0, "city": "Graz"}})


def make_encoder_with_tools() -> ChatEncoder:
    tokenizer = template_tokenizer("phi-4-mini")
    tokenizer.chat_template = TEMPLATE
    return make_encoder(tokenizer)


def a_chat(i: int) -> dict[str, Any]:
    """A chat; every third calls a tool, every fourth has reasoning, every fifth the row's own system text."""
    answer: dict[str, Any] = {"role": "assistant", "content": f"“{i}” – ü🙂 \n\t<|end|> 2024-01-01"}
    if i % 4 == 1:
        answer["reasoning_content"] = f"{i} is {i % 7} more than a multiple of seven."
    turns: Rows = [{"role": "user", "content": f"What is {i}?" if i % 10 else "7"}, answer]
    row: dict[str, Any] = {"messages": turns, "id": i}
    if i % 3 == 0:
        call = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS[i // 3 % len(ARGUMENTS)]}}
        content = None if i % 2 else ""
        objects = {"role": "assistant", "content": content, "tool_calls": [{**call, "id": f"c{i}"}] * (1 + i % 2)}
        turns[1:1] = [
            objects if i % 5 else {"role": "function_call", "content": AS_TEXT},
            {"role": "tool", "content": '{"rain": null, "days": 2.0}', "tool_call_id": f"c{i}"},
        ]
        row["tools"] = TOOLS[: 1 + i % 2]
    if i % 5 == 0:
        row["system"] = "NA" if i % 2 else "Be brief."
    if i % 7:
        row["kind"] = ["a", "b", "", "NA"][i % 4]
    if i % 11 == 0:
        turns[-1]["train"] = i % 2 == 0
        turns += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": ""}]
    return row


CHATS = [a_chat(i) for i in range(200)]


def columns_of(rows: Rows) -> dict[str, list[Any]]:
    return {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}


def jsonl(place: Path, rows: Rows) -> Path:
    return write_jsonl(place.with_suffix(".jsonl"), rows)


def json_list(place: Path, rows: Rows) -> Path:
    file = place.with_suffix(".json")
    file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return file


def wide(place: Path, rows: Rows) -> Path:
    file = place.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-16")
    return file


def csv_cells(place: Path, rows: Rows) -> Path:
    file = place.with_suffix(".csv")
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        columns = columns_of(rows)
        writer.writerow(columns)
        for values in zip(*columns.values(), strict=True):
            writer.writerow([json.dumps(one, ensure_ascii=False) if isinstance(one, list) else one for one in values])
    return file


def schema_of(rows: Rows) -> Any:
    """The columns of some of the chats, as they are in the table of all: the keys of a struct have one order."""
    whole = pyarrow.table(columns_of(CHATS)).schema
    return pyarrow.schema([whole.field(name) for name in columns_of(rows)])


def data_set(rows: Rows) -> Dataset:
    return Dataset.from_dict(columns_of(rows), features=Features.from_arrow_schema(schema_of(rows)))


def parquet(place: Path, rows: Rows) -> Path:
    file = place.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns_of(rows), schema_of(rows)), file, row_group_size=70)
    return file


def saved(place: Path, rows: Rows) -> Path:
    data_set(rows).save_to_disk(str(place))
    return place


def saved_splits(place: Path, rows: Rows) -> Path:
    halves = {"test": data_set(rows[:9]), "train": data_set(rows)}
    DatasetDict(halves).save_to_disk(str(place))
    return place


def typed_otherwise(place: Path, rows: Rows) -> Path:
    """A Parquet file whose texts are of the types that pandas and Spark write."""
    table = pyarrow.table(columns_of(rows), schema_of(rows))
    for name, kind in (
        ("kind", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
        ("system", pyarrow.large_string()),
    ):
        place_of = table.schema.get_field_index(name)
        table = table.set_column(place_of, name, table.column(name).cast(kind))
    pyarrow.parquet.write_table(table, place.with_suffix(".parquet"))
    return place.with_suffix(".parquet")


def saved_as_json(place: Path, rows: Rows) -> Path:
    Dataset.from_dict(columns_of(rows), on_mixed_types="use_json").save_to_disk(str(place))
    return place


def saved_as_arrays(place: Path, rows: Rows) -> Path:
    data_set(rows).with_format("numpy").save_to_disk(str(place))
    return place


def folder_of(*writers: Callable[[Path, Rows], Path]) -> Callable[[Path, Rows], Path]:
    """A folder with as many files, each with its part of the rows."""

    def write(place: Path, rows: Rows) -> Path:
        place.mkdir()
        size = -(-len(rows) // len(writers))
        for number, writer in enumerate(writers):
            writer(place / f"part-{number}", rows[number * size : (number + 1) * size])
        return place

    return write


STORAGE: dict[str, Callable[[Path, Rows], Path]] = {
    "json list": json_list,
    "csv": csv_cells,
    "parquet": parquet,
    "parquet of other types": typed_otherwise,
    "saved": saved,
    "saved as json": saved_as_json,
    "saved splits": saved_splits,
    "saved as arrays": saved_as_arrays,
    "folder of jsonl": folder_of(jsonl),
    "folder of csv": folder_of(csv_cells),
    "folder of two parquets": folder_of(parquet, parquet),
    "folder of all kinds": folder_of(jsonl, csv_cells, parquet, json_list),
}
