"""Documents become chunks: nothing is lost, nothing is too long, and what cannot be read is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ratchet.synthesis.documents import MOST_BYTES, Library, cut

WORDS = st.text("ab.é ", min_size=1, max_size=60)


def read(root: Path, *places: str) -> dict[str, str]:
    return {document.name: document.text for document in Library(places, root).read()}


def unreadable(root: Path, *places: str) -> dict[str, str]:
    library = Library(places, root)
    list(library.read())
    return dict(library.unreadable)


def test_files_folders_and_globs_are_read_by_their_kind(tmp_path):
    (tmp_path / "docs/deep/.git").mkdir(parents=True)
    (tmp_path / "docs/a.md").write_text("# Hail\n\nCovered.")
    (tmp_path / "docs/deep/b.txt").write_bytes(b"\xef\xbb\xbfStorm\r\nis covered.")
    (tmp_path / "docs/deep/.git/c.txt").write_text("hidden")
    (tmp_path / "d.rst").write_text("Fire\n====\n", encoding="utf-16")
    expected = {"docs/a.md": "# Hail\n\nCovered.", "docs/deep/b.txt": "Storm\nis covered."}
    assert read(tmp_path, "docs") == expected
    assert read(tmp_path, "docs/*.md", "d.rst") == {"docs/a.md": "# Hail\n\nCovered.", "d.rst": "Fire\n===="}
    assert read(tmp_path, str(tmp_path / "docs/a.md")) == {"docs/a.md": "# Hail\n\nCovered."}


def test_a_url_of_any_file_system_is_read_and_its_secret_stays_out_of_the_name(tmp_path):
    import fsspec

    with fsspec.open("memory://rules/hail.txt", "wb") as out:
        out.write(b"Hail is covered.")
    assert read(tmp_path, "memory://rules/hail.txt") == {"memory://rules/hail.txt": "Hail is covered."}
    assert unreadable(tmp_path, "nosuch://ana:secret@example.org/a.txt?sig=secret") == {
        "nosuch://example.org/a.txt": "cannot be opened: ValueError"
    }


def test_a_name_is_no_glob_where_the_file_exists_and_may_be_any_bytes(tmp_path):
    (tmp_path / "a[1].txt").write_text("Hail.")
    (tmp_path / "docs").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "docs") + b"/caf\xe9.txt")).write_text("Storm.")
    assert read(tmp_path, "a[1].txt", "docs") == {"a[1].txt": "Hail.", "docs/caf?.txt": "Storm."}


def test_html_is_read_without_tags_scripts_and_styles(tmp_path):
    (tmp_path / "a.html").write_text(
        "<html><style>p{}</style><body><h1>Hail &amp; storm</h1><p>From "
        "<b>10</b>&nbsp;mm<br>on.<script>alert('x')</script><p>Unclosed <ul><li>one<li>two"
    )
    text = read(tmp_path, "a.html")["a.html"]
    assert [line.strip() for line in text.split("\n") if line.strip()] == [
        "Hail & storm",
        "From 10 mm",
        "on.",
        "Unclosed",
        "one",
        "two",
    ]


def test_each_line_of_json_is_a_document_and_a_broken_one_is_named(tmp_path):
    lines = [
        '{"text": "Hail."}',
        "",
        "no json",
        '{"title": "x"}',
        '{"text": 7}',
        '{"text": "  "}',
        '{"text": "\\ud800"}',
        '{"text": "a\\u0000"}',
        "[" * 100_000,
        '{"text": "Storm."}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read(tmp_path, "a.jsonl") == {"a.jsonl:1": "Hail.", "a.jsonl:10": "Storm."}
    assert sorted(unreadable(tmp_path, "a.jsonl")) == sorted(
        f"a.jsonl:{number}" for number in (3, 4, 5, 6, 7, 8, 9)
    )


def test_what_cannot_be_read_is_named_with_its_reason_and_stops_nothing(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Prämie".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"MZ\x00\x01")
    (tmp_path / "blank.txt").write_text(" \n ")
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.7")
    with (tmp_path / "huge.txt").open("wb") as out:
        out.truncate(MOST_BYTES + 1)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good.txt").write_text("Hail is covered.")
    (tmp_path / "empty").mkdir()
    places = [
        "latin.txt",
        "binary.txt",
        "blank.txt",
        "paper.pdf",
        "huge.txt",
        "gone.txt",
        "missing.txt",
        "no-*.md",
        "empty",
        "good.txt",
    ]
    assert read(tmp_path, *places) == {"good.txt": "Hail is covered."}
    found = unreadable(tmp_path, *places)
    assert found["latin.txt"] == "no UTF-8"
    assert "NUL" in found["binary.txt"]
    assert found["blank.txt"] == "no text"
    assert ".pdf" in found["paper.pdf"]
    assert "32 MiB" in found["huge.txt"]
    assert found["gone.txt"] == found["missing.txt"] == "No such file or directory"
    assert found["no-*.md"] == "matches no file"
    assert found["empty"] == "an empty folder"
    assert len(found) == 9


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    assert unreadable(tmp_path, "a.txt") == {"a.txt": "Permission denied"}


def test_the_same_passage_of_two_documents_is_one_chunk(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("Hail is covered.")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "Storm is covered."}))
    chunks = list(Library(["a.txt", "b.txt", "c.jsonl"], tmp_path).chunks(chunk_chars=200, overlap_chars=0))
    assert [(chunk.document, chunk.text) for chunk in chunks] == [
        ("a.txt", "Hail is covered."),
        ("c.jsonl:1", "Storm is covered."),
    ]
    assert len({chunk.id for chunk in chunks}) == 2


@given(st.lists(WORDS, max_size=20), st.integers(20, 120), st.integers(0, 60))
@example(["a " * 200], 20, 10)
@example(["a" * 500], 20, 0)
def test_chunks_are_short_enough_and_hold_every_word_in_order(paragraphs, chunk_chars, overlap_chars):
    chunks = list(cut("\n\n".join(paragraphs), chunk_chars=chunk_chars, overlap_chars=overlap_chars))
    assert all(0 < len(chunk) <= chunk_chars for chunk in chunks)
    letters = iter("".join("".join(chunks).split()))
    assert all(
        letter in letters for letter in "".join("".join(paragraphs).split())
    )  # a subsequence: overlaps repeat some


@given(st.lists(st.text("ab", min_size=1, max_size=30), min_size=1, max_size=20))
def test_without_overlap_nothing_is_repeated(paragraphs):
    assert (
        "\n\n".join(cut("\n\n".join(paragraphs), chunk_chars=60, overlap_chars=0)).split("\n\n") == paragraphs
    )


def test_an_overlap_repeats_whole_paragraphs_of_the_chunk_before():
    paragraphs = [f"Paragraph number {number} of ten." for number in range(10)]
    chunks = list(cut("\n\n".join(paragraphs), chunk_chars=100, overlap_chars=40))
    assert [chunk.split("\n\n")[0] for chunk in chunks[1:]] == [
        chunk.split("\n\n")[-1] for chunk in chunks[:-1]
    ]
    assert len(chunks) < 10
