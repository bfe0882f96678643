"""Rows of files in every format that people have: told by content, whole, and nothing guessed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from pyarrow import feather, ipc, parquet

from ratchet.config.data import IngestConfig, JsonlSource
from ratchet.config.params import Config
from ratchet.data.batches import read_manifest
from ratchet.data.forms import MAX_LINE
from ratchet.errors import ConfigError, DataError, UserError
from ratchet.files import sha256_file
from ratchet.sources.columns import parse_columns
from ratchet.sources.jsonl import read_lines
from tasks.ingest import Pulled, add_batch, pull

CONFIG = Config()
ROWS = [
    {"prompt": f'What is "number" {n},\nand why?', "completion": f"ä{n}; a\tb", "id": f"00{n}"}
    for n in range(30)
]
Write = Callable[[Path, list[dict[str, Any]]], Any]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table_of(rows: list[dict[str, Any]], delimiter: str = ",", encoding: str = "utf-8") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(encoding)


def dumps(rows: Any, **more: Any) -> bytes:
    return json.dumps(rows, ensure_ascii=False, **more).encode()


def by_column(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def indexed(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {key: {str(n): row[key] for n, row in enumerate(rows)} for key in rows[0]}


def split_table(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {
        "columns": list(rows[0]),
        "index": list(range(len(rows))),
        "data": [list(row.values()) for row in rows],
    }


def written_arrow(path: Path, rows: list[dict[str, Any]], open_writer: Any) -> None:
    table = pa.Table.from_pylist(rows)
    with open_writer(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


FORMATS: dict[str, tuple[Write, str]] = {
    "lines": (lambda path, rows: path.write_bytes(lines_of(rows)), "JSON Lines"),
    "array": (lambda path, rows: path.write_bytes(dumps(rows)), "JSON array"),
    "pretty array": (lambda path, rows: path.write_bytes(dumps(rows, indent=2)), "JSON array"),
    "tabs": (lambda path, rows: path.write_bytes(dumps(rows, indent="\t")), "JSON array"),
    "pretty objects": (
        lambda path, rows: path.write_bytes(b"\n".join(dumps(row, indent=4) for row in rows)),
        "JSON objects",
    ),
    "data key": (lambda path, rows: path.write_bytes(dumps({"data": rows})), "JSON under 'data'"),
    "pretty data key": (
        lambda path, rows: path.write_bytes(dumps({"version": "1", "rows": rows}, indent=1)),
        "JSON under 'rows'",
    ),
    "columns": (lambda path, rows: path.write_bytes(dumps(by_column(rows))), "JSON columns"),
    "pandas": (lambda path, rows: path.write_bytes(dumps(indexed(rows))), "JSON columns"),
    "pandas split": (lambda path, rows: path.write_bytes(dumps(split_table(rows))), "JSON columns"),
    "csv": (lambda path, rows: path.write_bytes(table_of(rows)), "CSV"),
    "csv with mark": (lambda path, rows: path.write_bytes(table_of(rows, encoding="utf-8-sig")), "CSV"),
    "csv of Excel": (lambda path, rows: path.write_bytes(b"sep=;\r\n" + table_of(rows, ";")), "CSV"),
    "csv with semicolons": (lambda path, rows: path.write_bytes(table_of(rows, ";")), "CSV"),
    "tsv": (lambda path, rows: path.write_bytes(table_of(rows, "\t")), "TSV"),
    "parquet": (
        lambda path, rows: parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=8),
        "Parquet",
    ),
    "arrow": (lambda path, rows: written_arrow(path, rows, ipc.new_file), "Arrow"),
    "arrow stream": (lambda path, rows: written_arrow(path, rows, ipc.new_stream), "Arrow stream"),
    "feather": (lambda path, rows: feather.write_feather(pa.Table.from_pylist(rows), str(path)), "Arrow"),
}


def read(path: object) -> list[Any]:
    return [json.loads(line) for line in read_lines(JsonlSource(path=str(path)))]


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: object, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        pull(CONFIG, path=str(path), **more)
    return str(caught.value)


def pack(content: bytes, codec: str) -> bytes:
    return gzip.compress(content) if codec == "gzip" else pa.compress(content, codec="zstd", asbytes=True)


# --- formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["", "gzip", "zstd"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_bytes_whatever_its_name(tmp_path, format, packing):
    """So the same rows make no second batch, and an id keeps its zeros."""
    write, name = FORMATS[format]
    path = tmp_path / "rows.xyz"
    write(path, ROWS)
    if packing:
        path.write_bytes(pack(path.read_bytes(), packing))
    pulled = pull(CONFIG, path=str(path))
    assert b"".join(line + b"\n" for line in pulled.lines) == lines_of(ROWS)
    assert pulled.form == "completion"
    (file,) = pulled.files
    assert (file.name, file.sha256, file.rows) == ("rows.xyz", sha256_file(path), 30)
    assert file.format == (f"{name}, {packing}" if packing else name)


def test_a_batch_says_what_its_rows_came_from(tmp_path):
    path = written(tmp_path / "tickets.csv", b"text,label,note\nhail?,yes,x\nfire?,no,y\n")
    pulled = pull(CONFIG, path=str(path), columns={"prompt": "text", "completion": "label"})
    batch, _ = add_batch(tmp_path / "raw", pulled, licence="CC0-1.0", who="Ana")
    assert [batch] == read_manifest(tmp_path / "raw")
    assert batch.columns == {"prompt": "text", "completion": "label"}
    assert [(file.name, file.format) for file in batch.files] == [("tickets.csv", "CSV")]
    plain, _ = add_batch(
        tmp_path / "raw", Pulled([b'{"text": "a"}'], "pydoc", "x", "text"), licence="", who=""
    )
    assert b'"files"' not in (tmp_path / "raw/manifest.jsonl").read_bytes().splitlines()[1]
    assert (plain.files, plain.columns) == ((), {})


def test_files_of_several_formats_make_one_batch(tmp_path):
    for number, format in enumerate(("csv", "parquet", "pretty array")):
        FORMATS[format][0](tmp_path / f"{number}", ROWS[number * 10 : number * 10 + 10])
    pulled = pull(CONFIG, path=str(tmp_path / "*"))
    assert b"".join(line + b"\n" for line in pulled.lines) == lines_of(ROWS)
    assert [file.format for file in pulled.files] == ["CSV", "Parquet", "JSON array"]


def test_rows_of_one_shared_prompt_pack_seventy_times_and_are_read(tmp_path):
    system = "You are the support assistant of a shop that sells garden tools. " * 60
    rows = [
        {"messages": [{"role": role, "content": f"{text}{n}"} for role, text in
                      (("system", system), ("user", "q"), ("assistant", "a"))]}
        for n in range(2000)
    ]  # fmt: skip
    content = lines_of(rows)
    path = written(tmp_path / "rows.jsonl.gz", gzip.compress(content))
    assert len(content) > 50 * path.stat().st_size
    assert len(pull(CONFIG, path=str(path)).lines) == 2000


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
@pytest.mark.parametrize("keep", [5, 40, -3])
def test_a_packed_file_that_is_cut_is_refused(tmp_path, codec, keep):
    path = written(tmp_path / "rows", pack(lines_of(ROWS), codec)[:keep])
    assert f"broken {codec} file" in refused(path)


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_a_columnar_file_that_is_cut_is_refused(tmp_path, format):
    FORMATS[format][0](tmp_path / "rows", ROWS)
    written(tmp_path / "rows", (tmp_path / "rows").read_bytes()[:-60])
    assert f"is a broken {FORMATS[format][1]} file" in refused(tmp_path / "rows")


def test_a_parquet_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    """One text a million times is a few kB: the limit is on what comes out."""
    monkeypatch.setattr("ratchet.sources.streams.MOST_UNPACKED", 2**20)
    parquet.write_table(pa.table({"text": ["word " * 2000] * 1000}), tmp_path / "rows")
    assert (tmp_path / "rows").stat().st_size < 2**16
    assert "holds more than" in refused(tmp_path / "rows")


# --- what is no rows ----------------------------------------------------------------------------------------


def office(inside: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("[Content_Types].xml", "<x/>")
        packed.writestr(inside, "<x/>")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "seen", "helps"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a picture (PNG)", "file of the rows"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "a picture (JPEG)", "file of the rows"),
        (b"FEA1" + bytes(100), "Feather file of version 1", "Parquet"),
        (b"%PDF-1.7\n1 0 obj\n", "a PDF", "ratchet synthesize"),
        (office("xl/workbook.xml"), "an Excel workbook", "CSV"),
        (office("word/document.xml"), "a Word document", "CSV"),
        (office("a/rows.jsonl"), "an archive (zip)", "unpack it"),
        (b"SQLite format 3\x00" + bytes(100), "an SQLite database", "--query"),
        (b"\x80\x04\x95" + bytes(50), "a pickle", "never read"),
        (b"<!DOCTYPE html>\n<html><body>Sign in, please</body></html>", "a page", "login"),
        ("Dear Sir, I write to you,\nas promised, about the hail.\nYours, Ana\n", "a text", "synthesize"),
        ("just one line of prose", "a text", "synthesize"),
        ("one\ntwo\nthree\n", "a text", "header"),
        (bytes(range(1, 256)) * 9, "a", "wanted rows"),
        ("a,b\n1,2\n".encode("utf-16"), "UTF-16", "iconv"),
        (b'{"text": "a"}\r{"text": "b"}\r', "carriage return", "tr "),
        (b"[1, 2, 3]", "JSON array of int", "object"),
        (b"[[1], [2]]", "JSON array of list", "object"),
        (b'[{"text": "a"},\n {"text": "b"},\n {"text" "c"}]', "line 3, column 10", "mend"),
        (b'[{"text": "a"}] and more', "line 1, column 17", "mend"),
        (b'[{"text": "a"}', "broken JSON", "mend"),
        (b'{\n "text": "a"\n}\n{\n "text": \n}', "line 6, column 1", "mend"),
        (b'{"prompt": ["a", "b"], "completion": ["c"]}', "unequal lengths", ""),
        (b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "train, test", "jq"),
        (b'{"name": "ratchet", "private": true}', "fit no form", "--columns"),
    ],
)  # fmt: skip
def test_what_holds_no_rows_is_refused_with_what_helps(tmp_path, content, seen, helps):
    said = refused(written(tmp_path / "rows.jsonl", content))
    assert "rows.jsonl" in said and seen in said and helps in said, said


def test_of_several_files_one_without_rows_refuses_all(tmp_path):
    written(tmp_path / "1.csv", "prompt,completion\na,b\n")
    written(tmp_path / "2.csv", "frage,antwort\na,b\n")
    assert "2.csv" in refused(tmp_path / "*.csv")


def test_a_folder_is_refused_with_the_glob_that_reads_it(tmp_path):
    (tmp_path / "data").mkdir()
    FORMATS["parquet"][0](tmp_path / "data/train-0.parquet", ROWS)
    said = refused(tmp_path)
    assert "data/train-0.parquet" in said and f"{tmp_path}/data/*.parquet" in said


# --- cells --------------------------------------------------------------------------------------------------


def test_cells_of_a_csv_stay_text_and_empty_ones_are_absent(tmp_path):
    path = written(
        tmp_path / "rows",
        b'id,question,answer,user\r\n007,"a ""b"", c\r\nd",3.10,\r\n,x,true,Ana\r\n'
        b',,,\r\n\r\n0,"",y\r\n1,z,w,\r\n',
    )
    assert read(path) == [
        {"id": "007", "question": 'a "b", c\r\nd', "answer": "3.10"},
        {"question": "x", "answer": "true", "user": "Ana"},
        {"id": "0", "answer": "y"},
        {"id": "1", "question": "z", "answer": "w"},
    ]


def test_a_row_with_too_many_cells_is_left_for_preparation_to_count(tmp_path):
    rows = "".join(f"q{n},a{n}\n" for n in range(20))
    path = written(tmp_path / "rows", f"prompt,completion\n{rows}one,two,three\nlast,row\n")
    found = read(path)
    assert found[20:] == [["one", "two", "three"], {"prompt": "last", "completion": "row"}]


def test_quotes_in_a_tsv_without_quoting_are_text(tmp_path):
    path = written(tmp_path / "rows", 'prompt\tcompletion\n"Hail" is what?\t5" of ice\nx\t"y\n')
    assert read(path) == [
        {"prompt": '"Hail" is what?', "completion": '5" of ice'},
        {"prompt": "x", "completion": '"y'},
    ]


def test_a_quote_that_never_ends_is_refused_with_its_line(tmp_path):
    rows = "".join(f"q{n},a{n}\n" for n in range(120_000))
    said = refused(written(tmp_path / "rows.csv", f'prompt,completion\n{rows}x,"y\n{rows}'))
    assert "rows.csv is a broken CSV: line" in said


def test_a_wrong_quote_under_a_known_header_is_told_by_its_line(tmp_path):
    said = refused(written(tmp_path / "rows.csv", 'prompt,completion\na,b\n"hail" or what,c\n'))
    assert "rows.csv is a broken CSV: line 3" in said


def test_a_table_without_rows_is_told_as_such(tmp_path):
    assert "gave no rows" in refused(written(tmp_path / "rows.csv", "prompt,completion\n"))


def test_a_number_or_a_depth_that_nobody_reads_is_told(tmp_path):
    row = b'[{"text": "a"}, {"text": %s}]'
    for value in (b"1" * 5000, b"[" * 100_000 + b"]" * 100_000):
        assert "is broken JSON: line 1, column 17" in refused(written(tmp_path / "rows", row % value))


def test_a_csv_of_another_encoding_is_refused_with_the_command_that_converts_it(tmp_path):
    path = written(tmp_path / "rows.csv", "prompt;completion\nprüfen;ja\n".encode("cp1252"))
    assert "iconv -f WINDOWS-1252" in refused(path)


def test_a_csv_with_one_column_is_read_where_its_header_is_a_form(tmp_path):
    path = written(tmp_path / "rows", 'text\none\n"two, and more"\n')
    assert read(path) == [{"text": "one"}, {"text": "two, and more"}]
    path = written(tmp_path / "body", "body\none\ntwo\n")
    pulled = pull(CONFIG, path=str(path), columns={"text": "body"})
    assert pulled.lines == [b'{"text": "one"}', b'{"text": "two"}']


def test_a_csv_in_which_the_longest_text_stands_first_is_told_by_its_start(tmp_path):
    long = "word " * 150_000  # the head ends within the fourth row
    rows = [{"prompt": long, "completion": "a"} for _ in range(5)]
    assert read(written(tmp_path / "rows", table_of(rows))) == rows


def test_messages_in_a_cell_are_read_as_the_list_that_they_are(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = written(tmp_path / "rows", table_of([{"messages": json.dumps(turns), "id": "1"}]))
    assert read(path) == [{"messages": turns, "id": "1"}]
    assert pull(CONFIG, path=str(path)).form == "messages"


def test_values_of_a_parquet_file_become_what_json_has_for_them(tmp_path):
    when = datetime(2026, 1, 2, tzinfo=UTC)
    table = pa.table(
        {
            "prompt": ["a", None],
            "n": [7, None],
            "x": [0.5, math.nan],
            "when": [when, None],
            "price": [Decimal("1.50"), None],
            "kind": pa.array(["c", "d"]).dictionary_encode(),
            "flag": [True, False],
        }
    )
    parquet.write_table(table, tmp_path / "rows")
    first = {"prompt": "a", "n": 7, "x": 0.5, "when": when.isoformat(), "price": "1.50"}
    assert read(tmp_path / "rows") == [
        {**first, "kind": "c", "flag": True},
        {"kind": "d", "flag": False},
    ]


def test_fields_that_arrow_fills_with_null_are_absent(tmp_path):
    turns = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"place": "here"}}]},
    ]
    parquet.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "rows")
    assert read(tmp_path / "rows") == [{"messages": turns}]


def test_a_column_of_bytes_is_refused_and_can_be_left_out(tmp_path):
    parquet.write_table(pa.table({"text": ["a"], "label": ["b"], "blob": [b"ID3"]}), tmp_path / "rows")
    assert "column 'blob' holds bytes" in refused(tmp_path / "rows")
    pulled = pull(CONFIG, path=str(tmp_path / "rows"), columns={"prompt": "text", "completion": "label"})
    assert pulled.lines == [b'{"prompt": "a", "completion": "b"}']
    assert len(pulled.said) == 1 and pulled.said[0].endswith("left out: blob")


def test_what_is_wrong_with_a_row_of_an_array_is_left_for_preparation_to_see(tmp_path):
    rows = [b'{"text": "a"}', b'{"text": "a", "text": "b"}', b'{"text": NaN}', b"7", b'{"text": "\\ud800"}']
    path = written(tmp_path / "rows", b"[" + b",\n".join(rows) + b"]")
    assert list(read_lines(JsonlSource(path=str(path)))) == rows
    long = b'{"text": "%s"}' % (b"x" * MAX_LINE)
    path = written(tmp_path / "long", b"[" + b",".join([rows[0], long]) + b"]")
    assert list(read_lines(JsonlSource(path=str(path)))) == [rows[0], long[:MAX_LINE]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_row_alone_is_a_row_and_no_table(tmp_path, row, indent):
    assert read(written(tmp_path / "rows", dumps(row, indent=indent))) == [row]


# --- columns ------------------------------------------------------------------------------------------------

TICKETS = b"text,category,id,mood\nhail?,damage,007,calm\nfire?,damage,008,\n"
MAPPING = {"prompt": "text", "completion": "category"}


def test_mapped_columns_come_by_their_new_names_and_the_rest_is_said(tmp_path):
    pulled = pull(CONFIG, path=str(written(tmp_path / "t.csv", TICKETS)), columns=MAPPING)
    assert [json.loads(line) for line in pulled.lines] == [
        {"prompt": "hail?", "completion": "damage", "id": "007"},
        {"prompt": "fire?", "completion": "damage", "id": "008"},
    ]
    assert pulled.form == "completion" and dict(pulled.columns) == MAPPING
    assert len(pulled.said) == 1 and pulled.said[0].endswith("left out: mood")


def test_columns_of_params_yaml_are_mapped_and_the_command_line_wins(tmp_path):
    config = CONFIG.model_copy(update={"ingest": IngestConfig(columns=MAPPING)})
    path = str(written(tmp_path / "t.csv", TICKETS))
    assert json.loads(pull(config, path=path).lines[0])["completion"] == "damage"
    other = pull(config, path=path, columns={"prompt": "text", "completion": "mood"})
    assert json.loads(other.lines[0])["completion"] == "calm"
    FORMATS["csv"][0](tmp_path / "known", ROWS)
    assert pull(config, path=str(tmp_path / "known"), columns={}).form == "completion"


def test_a_key_that_means_something_stays_beside_the_mapped_ones(tmp_path):
    row = {"q": "a", "a": "b", "system": "be kind", "weight": 0, "text": "t", "w": 1}
    path = written(tmp_path / "rows", dumps([row]))
    pulled = pull(CONFIG, path=str(path), columns={"prompt": "q", "completion": "a"})
    kept = {"prompt": "a", "completion": "b", "system": "be kind", "weight": 0}
    assert [json.loads(line) for line in pulled.lines] == [kept]
    assert pulled.said[0].endswith("left out: text, w")
    path = written(tmp_path / "half", dumps([{"prompt": "a", "reply": "b", "text": "t"}]))
    assert pull(CONFIG, path=str(path), columns={"completion": "reply"}).form == "completion"


def test_lines_of_json_are_mapped_and_broken_ones_stay(tmp_path):
    path = written(tmp_path / "rows", b'{"q": "1", "a": "2"}\n{broken\n{"q": "3", "a": "4"}\n')
    pulled = pull(CONFIG, path=str(path), columns={"prompt": "q", "completion": "a"})
    assert pulled.lines == [
        b'{"prompt": "1", "completion": "2"}',
        b"{broken",
        b'{"prompt": "3", "completion": "4"}',
    ]


@pytest.mark.parametrize("format", ["csv", "parquet", "lines", "array", "columns"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path, format):
    FORMATS[format][0](tmp_path / "rows", [{"text": "a", "category": "b"}, {"text": "c", "category": "d"}])
    said = refused(tmp_path / "rows", columns={"prompt": "text", "completion": "categorie"})
    assert "no column 'categorie'" in said and "text, category" in said


def test_a_mapping_that_makes_no_whole_row_is_refused(tmp_path):
    path = written(tmp_path / "t.csv", TICKETS)
    assert "prompt, competion" in refused(path, columns={"prompt": "text", "competion": "category"})


def test_two_columns_of_no_form_are_not_guessed_at(tmp_path):
    said = refused(written(tmp_path / "t.csv", b"frage,antwort\na,b\n"))
    assert "frage, antwort" in said and "--columns prompt=COLUMN,completion=COLUMN" in said


def test_a_text_beside_what_may_be_its_answer_is_not_guessed_at(tmp_path):
    path = written(tmp_path / "t.csv", b"text,category\na,b\n")
    said = refused(path)
    assert "text, category" in said and "--columns prompt=text,completion=COLUMN" in said
    plain = pull(CONFIG, path=str(path), columns={"text": "text"})
    assert plain.form == "text" and plain.lines == [b'{"text": "a", "category": "b"}']
    path = written(tmp_path / "pages.csv", b"id,url,title,text\n1,a,b,c\n")
    assert pull(CONFIG, path=str(path)).form == "text"


def test_columns_are_given_as_pairs():
    assert parse_columns("prompt=text, completion = my category") == {
        "prompt": "text",
        "completion": "my category",
    }
    assert parse_columns("") == {}
    for wrong in ("prompt", "prompt=", "=text", "prompt=a,prompt=b"):
        with pytest.raises(UserError, match="KEY=COLUMN"):
            parse_columns(wrong)


# --- datasets, the hub, Label Studio ------------------------------------------------------------------------


def test_a_saved_dataset_is_read_with_its_classes_by_name_and_one_split_at_a_time(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Json, Value, disable_progress_bars

    disable_progress_bars()
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["no", "yes"]), "tools": [Json()]}
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, 1], "tools": [[{"name": "x"}], [{"n": None}], []]}
    saved = Dataset.from_dict(rows, features=features)
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    columns = {"prompt": "text", "completion": "label"}
    pulled = pull(CONFIG, path=str(tmp_path / "saved"), columns=columns)
    assert [json.loads(line) for line in pulled.lines] == [
        {"prompt": "a", "completion": "yes", "tools": [{"name": "x"}]},
        {"prompt": "b", "completion": "no", "tools": [{"n": None}]},
        {"prompt": "c", "completion": "yes", "tools": []},
    ]
    assert pulled.label == "saved" and [file.rows for file in pulled.files] == [2, 1]
    saved.to_parquet(tmp_path / "rows")
    assert pull(CONFIG, path=str(tmp_path / "rows"), columns=columns).lines == pulled.lines
    DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "both")
    said = refused(tmp_path / "both")
    assert "train, test" in said and "both/train" in said
    assert pull(CONFIG, path=str(tmp_path / "both/test"), columns=columns).lines == pulled.lines


def test_a_saved_dataset_leads_out_of_no_folder(tmp_path):
    (tmp_path / "saved").mkdir()
    written(tmp_path / "secret", lines_of(ROWS))
    written(tmp_path / "saved/state.json", dumps({"_data_files": [{"filename": "../secret"}]}))
    assert "is a folder" in refused(tmp_path / "saved")


def test_the_hub_is_a_filesystem_of_fsspec():
    from huggingface_hub import HfFileSystem

    assert fsspec.get_filesystem_class("hf") is HfFileSystem


def task(text: str, *answers: str | list[str], kind: str = "choices", **more: Any) -> dict[str, Any]:
    inside = "choices" if kind == "choices" else "text"
    return {
        "id": 1,
        "data": {"text": text, "source": "mail"},
        "annotations": [
            {
                "was_cancelled": False,
                "result": [
                    {
                        "from_name": "kind",
                        "to_name": "text",
                        "type": kind,
                        "value": {inside: [answer] if isinstance(answer, str) else answer},
                    }
                ],
            }
            for answer in answers
        ],
        **more,
    }


def test_an_export_of_label_studio_gives_a_row_for_each_answer(tmp_path):
    tasks = [task("hail?", "damage"), task("hi", "chat", "chat"), task("both?", "a", "b"), task("none")]
    tasks[0]["annotations"].append({**tasks[0]["annotations"][0], "was_cancelled": True})
    pulled = pull(CONFIG, path=str(written(tmp_path / "export.json", dumps(tasks))))
    assert [tuple(json.loads(line).items()) for line in pulled.lines] == [
        (("prompt", text), ("completion", answer))
        for text, answer in (("hail?", "damage"), ("hi", "chat"), ("both?", "a"), ("both?", "b"))
    ]
    assert pulled.files[0].format == "Label Studio" and len(pulled.said) == 2, "skipped, and none given"


def test_written_answers_and_several_choices_are_joined(tmp_path):
    tasks = [task("a", ["one", "two"], kind="textarea"), task("b", ["x", "y"])]
    assert [row["completion"] for row in read(written(tmp_path / "rows", dumps(tasks, indent=2)))] == [
        "one\ntwo",
        "x, y",
    ]


def test_an_export_with_several_questions_asks_which_is_meant(tmp_path):
    both = task("hail?", "damage")
    both["annotations"][0]["result"] += task("hail?", "calm")["annotations"][0]["result"]
    both["annotations"][0]["result"][1]["from_name"] = "mood"
    path = written(tmp_path / "rows", dumps([both]))
    assert "text, source, kind, mood" in refused(path)
    pulled = pull(CONFIG, path=str(path), columns={"prompt": "text", "completion": "mood"})
    assert pulled.lines == [b'{"prompt": "hail?", "completion": "calm", "source": "mail"}']


def test_an_export_of_spans_is_refused(tmp_path):
    spans = task("hail?", "damage")
    spans["annotations"][0]["result"][0].update(type="labels", value={"text": "hail", "labels": ["X"]})
    said = refused(written(tmp_path / "rows", dumps([spans])))
    assert "without choices or texts" in said and "labels" in said


# --- databases ----------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path) -> Path:
    import sqlite3

    path = tmp_path / "tickets.db"
    with sqlite3.connect(path) as opened:
        opened.execute("create table t (id integer, q text, a text)")
        rows = [(n, f"q{n}", f"a{n}" if n else None) for n in range(3)]
        opened.executemany("insert into t values (?, ?, ?)", rows)
    opened.close()
    return path


QUERY = "select q as prompt, a as completion, id from t order by id"


def test_the_result_of_a_query_is_rows(tmp_path, database):
    pulled = pull(CONFIG, root=tmp_path, path="sqlite:///tickets.db", query=QUERY)
    assert [json.loads(line) for line in pulled.lines] == [
        {"prompt": "q0", "id": 0},
        {"prompt": "q1", "completion": "a1", "id": 1},
        {"prompt": "q2", "completion": "a2", "id": 2},
    ]
    assert (pulled.source, pulled.label, pulled.form) == ("sql", "tickets", "completion")
    batch, _ = add_batch(tmp_path / "raw", pulled, licence="", who="")
    assert batch.query == QUERY and batch.files[0].format == "SQL" and batch.source == "sql"


def test_columns_of_a_query_are_mapped(tmp_path, database):
    pulled = pull(
        CONFIG,
        path=f"sqlite:///{database}",
        query="select * from t where id > 0",
        columns={"question": "q", "answer": "a"},
    )
    assert pulled.form == "question"
    assert json.loads(pulled.lines[0]) == {"question": "q1", "answer": "a1", "id": 1}


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("select * from nowhere", "no such table"),
        ("delete from t", "readonly|returns no rows"),
        ("selekt", "syntax error"),
        ("select q, q from t", "a column twice|q, q"),
        ("select q as prompt, a as completion from t where id > 9", "gave no rows"),
    ],
)
def test_a_query_that_fails_is_told_and_changes_nothing(tmp_path, database, query, words):
    before = database.read_bytes()
    with pytest.raises(DataError, match=words):
        pull(CONFIG, root=tmp_path, path="sqlite:///tickets.db", query=query)
    assert database.read_bytes() == before


def test_a_database_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(DataError, match=r"none\.db does not exist"):
        pull(CONFIG, root=tmp_path, path="sqlite:///none.db", query=QUERY)
    assert list(tmp_path.iterdir()) == []


def test_a_password_in_an_address_is_refused_and_told_nowhere(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="RATCHET_SQL_PASSWORD") as caught:
        pull(CONFIG, path="postgresql+psycopg://ana:hidden@127.0.0.1:1/claims", query="select 1")
    assert "hidden" not in str(caught.value)
    monkeypatch.setenv("RATCHET_SQL_PASSWORD", "hidden")
    with pytest.raises(DataError, match=r"postgresql\+psycopg://127\.0\.0\.1:1/claims") as failed:
        pull(CONFIG, path="postgresql+psycopg://ana@127.0.0.1:1/claims", query="select 1")
    assert "hidden" not in str(failed.value)


def test_an_address_without_a_query_is_refused():
    with pytest.raises(ConfigError, match=r"ingest\.sql\.query"):
        pull(CONFIG, path="sqlite:///rows.db")
