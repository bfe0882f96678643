"""What sources give and refuse: documentation strings by parsing, JSON Lines byte by byte."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from ratchet.config.data import JsonlSource, PydocSource
from ratchet.data.examples import encode_line
from ratchet.data.forms import MAX_LINE, read_conversation
from ratchet.errors import DataError
from ratchet.sources.jsonl import read_lines
from ratchet.sources.pydoc import first_sentence, harvest

HARVEST = """
import sys
from ratchet.config.data import PydocSource
from ratchet.data.examples import encode_line
from ratchet.sources.pydoc import harvest
sys.stdout.buffer.writelines(map(encode_line, harvest(PydocSource())))
"""

# --- pydoc --------------------------------------------------------------------------------------------------

COLOURS = '''"""Mix and name colours of light, not of paint."""

def mix(first, second):
    """Return the colour between two colours of light. More text that is no part of the answer."""

async def fetch(name):
    """Look a colour up in the public table of names."""

def short():
    """Too short."""

def silent():
    pass

class Palette:
    """An ordered set of colours with one name each."""

    def add(self, colour):
        """Append a colour unless its name is taken already."""

    class Entry:
        """A colour together with the name that it goes by."""

        def rename(self, name):
            """Give the entry another name, and keep its place."""

    def _hidden(self):
        """Rebuild the index of names after a change of order."""
'''


@pytest.fixture
def inks(tmp_path, monkeypatch):
    """A package of two modules that are large enough, one that is not, and files that hold no Python."""
    files = {
        "inks_for_test/__init__.py": '"""Everything about inks and colours, in one small package."""\n',
        "inks_for_test/colours.py": COLOURS,
        "inks_for_test/paper/__init__.py": '"""Sheets of paper that drink ink at a known speed."""\n',
        "inks_for_test/paper/sheet.py": (
            'def soak():\n    """Soak the sheet until it holds no more of the ink."""\n\n'
            'def dry():\n    """Dry the sheet in the sun until it stops to curl."""\n'
        ),
        "inks_for_test/tiny.py": (
            'def alone():\n    """The only documented object of this little module."""\n'
        ),
        "inks_for_test/broken.py": (
            'def broken(:\n    """A sentence that nobody can parse out of this file."""\n'
        ),
        "inks_for_test/old.py": '"""A module of the second Python, with its statements."""\nprint "ink"\n',
        "inks_for_test/_private.py": '"""A private module is no answer to give to a user."""\n' * 9,
        "inks_for_test/tests/test_ink.py": '"""The words of a test repeat the words of its module."""\n',
        "inks_for_test/module_folder.py/keep": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "inks_for_test/latin.py").write_bytes(
        '# -*- coding: latin-1 -*-\n"""Ein Modul über Tinte, in einer alten Kodierung."""\n'.encode("latin-1")
    )
    (tmp_path / "inks_for_test/garbage.py").write_bytes(
        b'"""\xff\xfe\x00 is no text in any encoding at all, so it is left out."""'
    )
    (tmp_path / "inks_for_test/gone.py").symlink_to(tmp_path / "nowhere.py")
    monkeypatch.syspath_prepend(tmp_path)
    return "inks_for_test"


def questions(rows) -> list[tuple[str, str]]:
    return [
        (
            row["messages"][0]["content"].removeprefix("Which module documents this? "),
            row["messages"][1]["content"],
        )
        for row in rows
        if row["meta"]["kind"] == "module"
    ]


def test_every_documented_object_becomes_a_row_with_its_module(inks):
    rows = list(harvest(PydocSource(packages=[inks], min_objects=3, summaries=0.0)))
    assert questions(rows) == [
        ("Mix and name colours of light, not of paint.", "inks_for_test.colours"),
        ("Return the colour between two colours of light.", "inks_for_test.colours"),
        ("Look a colour up in the public table of names.", "inks_for_test.colours"),
        ("An ordered set of colours with one name each.", "inks_for_test.colours"),
        ("Append a colour unless its name is taken already.", "inks_for_test.colours"),
        ("A colour together with the name that it goes by.", "inks_for_test.colours"),
        ("Give the entry another name, and keep its place.", "inks_for_test.colours"),
        ("Rebuild the index of names after a change of order.", "inks_for_test.colours"),
        ("Sheets of paper that drink ink at a known speed.", "inks_for_test.paper"),
        ("Soak the sheet until it holds no more of the ink.", "inks_for_test.paper"),
        ("Dry the sheet in the sun until it stops to curl.", "inks_for_test.paper"),
    ]
    assert all(
        row["meta"] == {"package": inks, "module": row["messages"][1]["content"], "kind": "module"}
        for row in rows
    )


def test_summaries_name_nested_objects_in_full_and_leave_private_ones_out(inks):
    rows = harvest(PydocSource(packages=[inks], min_objects=3, summaries=1.0))
    asked = {
        row["messages"][0]["content"]: row["messages"][1]["content"]
        for row in rows
        if row["meta"]["kind"] == "summary"
    }
    assert (
        asked["What does inks_for_test.colours.Palette.Entry.rename do?"]
        == "Give the entry another name, and keep its place."
    )
    assert (
        asked["What does inks_for_test.paper.sheet.soak do?"]
        == "Soak the sheet until it holds no more of the ink."
    )
    assert not [question for question in asked if "_hidden" in question]


def test_a_module_under_min_objects_is_not_asked_about(inks):
    def modules(min_objects: int) -> Counter:
        return Counter(
            answer for _, answer in questions(harvest(PydocSource(packages=[inks], min_objects=min_objects)))
        )

    assert modules(9) == Counter()
    assert modules(8) == {"inks_for_test.colours": 8}
    assert modules(3) == {"inks_for_test.colours": 8, "inks_for_test.paper": 3}
    assert modules(1)["inks_for_test.tiny"] == 1


def test_files_that_are_no_python_are_left_out_and_old_encodings_are_read(inks):
    found = questions(harvest(PydocSource(packages=[inks], min_objects=1)))
    assert {answer.rpartition(".")[2] for _, answer in found} == {
        "inks_for_test",
        "colours",
        "latin",
        "paper",
        "tiny",
    }
    assert ("Ein Modul über Tinte, in einer alten Kodierung.", "inks_for_test.latin") in found


def test_module_depth_decides_how_long_the_answer_is(inks):
    answers = {
        answer
        for _, answer in questions(harvest(PydocSource(packages=[inks], min_objects=1, module_depth=2)))
    }
    assert {"inks_for_test.colours", "inks_for_test.paper", "inks_for_test.paper.sheet"} <= answers


def test_harvesting_imports_nothing(inks):
    list(harvest(PydocSource(packages=[inks])))
    assert not [name for name in sys.modules if name.startswith(inks)]


@pytest.mark.parametrize("package", ["no_such_package_here", "no.such.package", "../etc", "", "sys"])
def test_a_package_without_python_source_is_named_with_what_to_do(package):
    with pytest.raises(
        DataError, match=r"(?s)is not installed here, or has no Python source.*ingest\.pydoc\.packages"
    ) as caught:
        list(harvest(PydocSource(packages=["json", package])))
    assert repr(package) in str(caught.value)


def test_the_standard_library_gives_thousands_of_rows_the_same_in_another_process():
    rows = list(harvest(PydocSource()))
    assert len(rows) > 3000
    assert len({row["messages"][1]["content"] for row in rows if row["meta"]["kind"] == "module"}) > 30
    assert all(encode_line(read_conversation(row).example(row["meta"])) for row in rows)
    done = subprocess.run(
        [sys.executable, "-c", HARVEST],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"".join(map(encode_line, rows))


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the mean of the values. It raises on none.", "Return the mean of the values."),
        ("Return the mean\n    of the values", "Return the mean of the values"),
        ("A summary without its stop\n\nA second paragraph.", "A summary without its stop"),
        (
            "E.g. this is cut after twenty characters at the least.",
            "E.g. this is cut after twenty characters at the least.",
        ),
        ("", ""),
        ("x" * 500, "x" * 220),
    ],
)
def test_the_first_sentence_is_one_line_of_at_most_220_characters(docstring, sentence):
    assert first_sentence(docstring) == sentence


# --- jsonl --------------------------------------------------------------------------------------------------


def read(path: object) -> list[bytes]:
    return list(read_lines(JsonlSource(path=str(path))))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_lines_come_as_they_are_and_blank_ones_are_none(tmp_path):
    path = written(tmp_path / "rows.jsonl", b'{"text": "a"}\n\n  \n{"text":  "b" }\nno json\n{"cut')
    assert read(path) == [b'{"text": "a"}', b'{"text":  "b" }', b"no json", b'{"cut']


def test_an_empty_file_gives_no_line(tmp_path):
    assert read(written(tmp_path / "rows.jsonl", b"")) == []


def test_a_glob_reads_every_file_in_the_order_of_names(tmp_path):
    for name in ("b", "a", "c"):
        written(tmp_path / f"{name}.jsonl", f'{{"text": "{name}"}}\n'.encode())
    written(tmp_path / "other.txt", b"not read\n")
    assert read(tmp_path / "*.jsonl") == [b'{"text": "a"}', b'{"text": "b"}', b'{"text": "c"}']


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "`ingest.jsonl.path` is empty"),
        ("nope.jsonl", r"nope\.jsonl does not exist"),
        ("*.jsonl", r"\*\.jsonl' matches no file"),
        ("folder", "folder is a folder, wanted files"),
        ("nosuch://bucket/rows.jsonl", "cannot open 'nosuch://bucket/rows.jsonl'"),
    ],
)
def test_a_path_that_gives_nothing_is_named(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_with_the_command_that_converts_it(tmp_path, encoding):
    path = written(tmp_path / "rows.jsonl", '{"text": "a"}\n'.encode(encoding))
    with pytest.raises(DataError, match=r"(?s)is UTF-16, wanted UTF-8.*iconv -f UTF-16 -t UTF-8"):
        read(path)


@pytest.mark.parametrize("start", [b"", b"  ", b"\n\n", b"\xef\xbb\xbf", b"\r\n"])
def test_a_json_array_is_read_as_its_elements(tmp_path, start):
    path = written(tmp_path / "rows.jsonl", start + b'[\n{"text": "a"},\n{"text": "b"}\n]\n')
    assert read(path) == [b'{"text": "a"}', b'{"text": "b"}']


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    assert read(written(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')) == [
        b'{"text": "a"}',
        b'{"text": "b"}',
    ]


def test_carriage_returns_are_no_part_of_a_row(tmp_path):
    assert read(written(tmp_path / "rows.jsonl", b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n')) == [
        b'{"text": "a"}',
        b'{"text": "b"}',
    ]


def test_separators_of_unicode_do_not_cut_a_row(tmp_path):
    rows = [
        f'{{"text": "one{separator}two"}}'.encode()
        for separator in ("\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c")
    ]
    assert read(written(tmp_path / "rows.jsonl", b"\n".join(rows) + b"\n")) == rows


def test_bytes_that_are_no_utf_8_stay_for_preparation_to_count(tmp_path):
    rows = [b'{"text": "a"}', b'{"text": "caf\xe9"}']
    assert read(written(tmp_path / "rows.jsonl", b"\n".join(rows))) == rows


@pytest.mark.parametrize("length", [MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, 3 * MAX_LINE, 3 * MAX_LINE + 17])
@pytest.mark.parametrize("last", [True, False])
def test_an_overlong_line_is_kept_cut_and_the_next_one_whole(tmp_path, length, last):
    rows = [b'{"text": "before"}', b"x" * length, b'{"text": "after"}'][: 2 if last else 3]
    found = read(written(tmp_path / "rows.jsonl", b"\n".join(rows) + (b"" if last else b"\n")))
    assert found == [rows[0], b"x" * min(length, MAX_LINE), *rows[2:]]


def test_lines_are_read_one_by_one(tmp_path):
    """A source larger than the memory must pass."""
    path = written(tmp_path / "rows.jsonl", b'{"text": "a"}\n' * 100_000)
    assert list(itertools.islice(read_lines(JsonlSource(path=str(path))), 2)) == [b'{"text": "a"}'] * 2


def test_any_filesystem_of_fsspec_is_read():
    memory = fsspec.filesystem("memory")
    memory.pipe("/ratchet-test/a.jsonl", b'{"text": "a"}\n')
    memory.pipe("/ratchet-test/b.jsonl", b'{"text": "b"}\n')
    try:
        assert read("memory://ratchet-test/a.jsonl") == [b'{"text": "a"}']
        assert read("memory://ratchet-test/*.jsonl") == [b'{"text": "a"}', b'{"text": "b"}']
        with pytest.raises(DataError, match="does not exist"):
            read("memory://ratchet-test/c.jsonl")
    finally:
        memory.rm("/ratchet-test", recursive=True)
