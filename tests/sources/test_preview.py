"""A preview shows rows as training would see them: every token, and which of them are learned."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command import ratchet
from places import make_repository, use_git_without_a_user

from flows.data_check import check_file
from ratchet.config.data import PrepareConfig
from ratchet.config.params import Config
from ratchet.data.validation import Origin, Validator
from ratchet.models.loading import load_chat
from ratchet.sources.preview import Piece, as_plain, preview_rows, print_preview
from tests.models.test_reasoning import chat_of

ORIGIN = Origin("march", "jsonl")


def line(prompt: str, completion: str, **more: Any) -> bytes:
    return json.dumps({"prompt": prompt, "completion": completion, **more}).encode()


def test_tokens_of_a_preview_are_those_that_training_sees(tiny_base):
    chat = load_chat(tiny_base)
    rows = [line("Is hail covered?", "yes, from 10 mm on"), line("洪水 🌊?", "नहीं, ❄ only")]
    found = preview_rows(rows, ORIGIN, PrepareConfig(), chat)
    for raw, row in zip(rows, found, strict=True):
        encoded = chat.encode(Validator(PrepareConfig()).check(raw, ORIGIN).example)
        assert "".join(piece.text for piece in row.pieces) == chat.tokenizer.decode(encoded.ids)
        learned = "".join(piece.text for piece in row.pieces if piece.learned)
        assert learned == row.example.answer + chat.tokenizer.decode([chat.stop_id])
        assert (row.tokens, row.learned) == (len(encoded.ids), sum(encoded.learned))
        assert not any("\ufffd" in piece.text for piece in row.pieces), "no half of a character"
    assert "🌊" in "".join(piece.text for piece in found[1].pieces if not piece.learned)


def test_earlier_answers_of_a_conversation_are_shown_as_learned(tiny_base):
    turns = [("user", "a?"), ("assistant", "first"), ("user", "b?"), ("assistant", "second")]
    row = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}).encode()
    (found,) = preview_rows([row], ORIGIN, PrepareConfig(), load_chat(tiny_base))
    learned = "".join(piece.text for piece in found.pieces if piece.learned)
    assert "first" in learned and "second" in learned and "a?" not in learned and "b?" not in learned


def test_five_rows_that_are_fit_are_shown_as_the_checks_leave_them():
    rows = [b"broken", line("a", "b", unheard="of"), *(line(f"q{n}\x07", f" a{n} ") for n in range(9))]
    found = preview_rows(rows, ORIGIN, PrepareConfig(), None)
    assert [row.example.question for row in found] == ["q0", "q1", "q2", "q3", "q4"]
    assert [row.example.answer for row in found] == ["a0", "a1", "a2", "a3", "a4"]
    assert all(row.pieces == [] for row in found)


@pytest.mark.parametrize("with_tokens", [True, False])
def test_a_preview_tells_pairs_and_answers_not_to_give(tiny_base, capsys, with_tokens):
    pair = json.dumps({"prompt": "hail?", "chosen": "covered", "rejected": "no idea"}).encode()
    rows = [line("hail?", "never", label=False), pair]
    found = preview_rows(rows, ORIGIN, PrepareConfig(), load_chat(tiny_base) if with_tokens else None)
    assert [(row["desirable"], row["worse"]) for row in as_plain(found)] == [(False, None), (True, "no idea")]
    print_preview(found)
    bad, good = capsys.readouterr().out.split("--- row 2")
    assert "never" in bad and "[[" not in bad and "not to give" in bad
    assert "a pair" in good and "worse answer: no idea" in good
    assert ("[[covered" in good) == with_tokens


def test_a_preview_tells_what_becomes_of_reasoning(tiny_base, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    rows = [line("q", "<think>\nhm\n</think>\n\na"), line("p", "b")]
    dropped = preview_rows(rows, ORIGIN, PrepareConfig(), load_chat(tiny_base))
    print_preview(dropped)
    said = capsys.readouterr().out
    assert "hm" not in said and "1 of these 2 rows have reasoning" in said and "drop" in said
    chat = chat_of("qwen3")
    learned = preview_rows(rows, ORIGIN, PrepareConfig(), chat)
    print_preview(learned)
    said = capsys.readouterr().out
    assert "[[<think>\nhm\n</think>\n\na<|im_end|>]]" in said and chat.told_reasoning in said
    assert as_plain(learned)[0]["messages"][1]["reasoning_content"] == "hm"
    assert [row["reasoning"] for row in as_plain(learned)] == [chat.told_reasoning, ""]
    print_preview(preview_rows(rows, ORIGIN, PrepareConfig(), None))
    assert "hm" in (said := capsys.readouterr().out) and "base.reasoning" in said


GOOD_CSV = "prompt,completion\nis hail covered?,yes\n"
# Content of a file → where its rejected rows stand, as people are told.
PLACES = {
    "csv": (f"{GOOD_CSV},no question\n", ["line 3 (row 2)"]),
    "quoted line breaks": (
        'prompt,completion\n"is hail\ncovered,\ntoo?",yes\n,no question\n"a\nb",yes\n,again\n',
        ["line 5 (row 2)", "line 8 (row 4)"],
    ),
    "blank lines and Excel's hint": (
        "sep=;\n\nprompt;completion\na;yes\n\n;no question\n",
        ["line 6 (row 2)"],
    ),
    "windows": (f"{GOOD_CSV},no question\n".replace("\n", "\r\n"), ["line 3 (row 2)"]),
    "tsv": ("prompt\tcompletion\na\tyes\n\tno question\n", ["line 3 (row 2)"]),
    "json lines": ('{"prompt": "a", "completion": "yes"}\n\n\n7\n', ["line 4 (row 2)"]),
    "json lines without blanks": ('{"prompt": "a", "completion": "yes"}\n7\n', ["line 2"]),
    "array": ('[{"prompt": "a", "completion": "yes"},\n\n{"prompt": "b"}]', ["row 2"]),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_check_tells_the_line_of_the_file_on_which_a_row_begins(tmp_path, kind):
    content, wanted = PLACES[kind]
    path = tmp_path / "rows"
    path.write_bytes(content.encode())
    verdict = check_file(str(path), tmp_path / "golden.jsonl", Config(), time="2026-01-01T00:00:00Z")
    assert [str(verdict.places[row.line]) for row in verdict.rejected] == wanted


def test_a_check_of_several_files_names_the_file_of_a_row(tmp_path):
    (tmp_path / "a.csv").write_text(f"{GOOD_CSV}and rain?,yes\n")
    (tmp_path / "b.csv").write_text(f"{GOOD_CSV},no question\n")
    verdict = check_file(
        str(tmp_path / "*.csv"), tmp_path / "golden.jsonl", Config(), time="2026-01-01T00:00:00Z"
    )
    (row,) = verdict.rejected
    assert (row.line, verdict.places[row.line]) == (4, (2, 3, "b.csv"))
    assert str(verdict.places[4]) == "b.csv, line 3 (row 2)"


def test_a_check_counts_rows_with_reasoning(tmp_path, tiny_base):
    path = tmp_path / "thought.jsonl"
    path.write_bytes(b"\n".join(line(f"q{n}?", f"{'<think>hm</think>' * (n < 7)}a{n}") for n in range(30)))
    verdict = check_file(
        str(path), tmp_path / "golden.jsonl", Config(), time="2026-01-01T00:00:00Z", base=tiny_base
    )
    assert verdict.counts.accepted["rows"] == 30
    (said,) = [text for text in verdict.said if "reasoning" in text]
    assert "7 rows" in said and "base.reasoning" in said


CALLING = {
    "tools": [{"type": "function", "function": {"name": "cover", "parameters": {"type": "object"}}}],
    "messages": [
        {"role": "user", "content": "Is hail covered?"},
        {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "Look again."},
        {"role": "assistant", "tool_calls": [{"function": {"name": "cover", "arguments": "{}"}}]},
    ],
}


def test_without_a_base_tools_calls_and_what_is_not_learned_are_shown(capsys):
    print_preview(preview_rows([json.dumps(CALLING).encode()], ORIGIN, PrepareConfig(), None))
    said = capsys.readouterr().out
    assert "tools: cover" in said and "assistant (not learned): wrong" in said
    assert 'assistant: <tool_call>{"arguments": {}, "name": "cover"}</tool_call>' in said


def test_a_base_whose_template_writes_no_tools_is_a_verdict_and_no_crash(tmp_path, tiny_base):
    path = tmp_path / "calls.jsonl"
    rows = [
        {**CALLING, "messages": [{"role": "user", "content": f"q{n}"}, *CALLING["messages"][1:]]}
        for n in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdict = check_file(
        str(path),
        tmp_path / "golden.jsonl",
        Config(),
        time="2026-01-01T00:00:00Z",
        base=tiny_base,
        preview=True,
    )
    assert verdict.counts.accepted["rows"] == 9 and len(verdict.preview) == 5
    assert verdict.failure and "9 of 9 rows cannot be learned" in verdict.failure
    assert "does not write the tools" in verdict.failure


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    use_git_without_a_user(monkeypatch)
    monkeypatch.setenv("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return make_repository(tmp_path / "checkout")


def table(root: Path) -> Path:
    path = root.parent / "tickets.csv"
    rows = "".join(f"is case {n} covered?;yes \x1b[31m{n}\n" for n in range(7))
    path.write_text(f"text;category\n{rows}")
    return path


MAPPED = ("--columns", "prompt=text,completion=category", "--preview")


def test_a_check_shows_learned_text_in_brackets_where_there_are_no_colours(root, tiny_base):
    shutil.copytree(tiny_base, root / "models/base")
    plain = ratchet("-C", root, "data", "check", table(root), *MAPPED)
    assert plain.returncode == 0, plain.stderr
    chat = load_chat(tiny_base)
    end = chat.tokenizer.decode([chat.stop_id])
    assert plain.stdout.count(f"[[yes 0{end}]]") == 1 and plain.stdout.count("[[") == 5
    assert "7 rows = accepted 7" in plain.stdout and "\x1b" not in plain.stdout


def test_learned_text_has_another_colour_and_no_text_steers_the_terminal(monkeypatch, capsys):
    pieces = [Piece("ask\x1b]0;x", False), Piece("[red]yes", True), Piece("\n", True)]
    (row,) = preview_rows([line("a", "b")], ORIGIN, PrepareConfig(), None)
    rows = [row._replace(pieces=pieces, tokens=3, learned=2)]
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_preview(rows)
    coloured = capsys.readouterr().out
    assert "\x1b]" not in coloured and "ask\\x1b]0;x" in coloured
    (green,) = [part for part in coloured.split("\x1b[0m") if "[red]yes" in part]
    assert ";42" in green or ";102" in green, "ANSI's green, or bright green, behind the text"
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("NO_COLOR", "1")
    print_preview(rows)
    assert "ask\\x1b]0;x[[[red]yes\n]]" in capsys.readouterr().out
    assert as_plain(rows)[0]["tokens"] == [["ask\x1b]0;x", False], ["[red]yes", True], ["\n", True]]


def test_an_ingest_with_a_preview_commits_nothing(root):
    before = {path for path in root.rglob("*") if ".git" not in path.parts}
    shown = ratchet("-C", root, "ingest", "--path", table(root), *MAPPED)
    assert shown.returncode == 0, shown.stderr
    assert "7 rows from jsonl (tickets), form completion" in shown.stdout
    assert "user: is case 0 covered?\nassistant: yes 0\n" in shown.stdout
    assert "models/base is not made yet" in shown.stdout and "nothing was committed" in shown.stdout
    assert {path for path in root.rglob("*") if ".git" not in path.parts} == before
    log = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, check=True)
    assert log.stdout == b""


def test_a_check_of_columns_that_nobody_named_says_the_command(root):
    done = ratchet("-C", root, "data", "check", table(root))
    assert done.returncode == 2
    assert "text, category" in done.stderr and "--columns prompt=text,completion=COLUMN" in done.stderr
    wrong = ratchet("-C", root, "data", "check", table(root), "--columns", "prompt")
    assert wrong.returncode == 2 and "KEY=COLUMN" in wrong.stderr


def test_a_check_and_an_ingest_tell_the_line_of_a_row_that_is_not_taken(root):
    path = root.parent / "broken.csv"
    path.write_text('prompt,completion\n"is hail\ncovered?",yes\n' + ",no question\n" * 9)
    told = ratchet("-C", root, "data", "check", path)
    assert told.returncode == 3 and "  line 4 (row 2) and 8 more: " in told.stdout
    assert "The first: line 4 (row 2): " in told.stderr
    row, *_ = json.loads(ratchet("-C", root, "data", "check", path, "--json").stdout)[0]["rejected"]
    assert (row["line"], row["row"]) == (4, 2) and "file" not in row
    taken = ratchet("-C", root, "ingest", "--path", path, "--preview")
    assert taken.returncode == 2 and "the first: line 4 (row 2): " in taken.stderr


def test_a_check_asks_a_database(root):
    import sqlite3

    with sqlite3.connect(root.parent / "t.db") as opened:
        opened.execute("create table t (q text, a text)")
        opened.executemany(
            "insert into t values (?, ?)", [(f"is case {n} covered?", f"{n}") for n in range(7)]
        )
    opened.close()
    query = ("--query", "select q as prompt, a as completion from t")
    done = ratchet("-C", root, "data", "check", f"sqlite:///{root.parent}/t.db", *query, "--preview")
    assert done.returncode == 0, done.stderr
    assert "7 rows = accepted 7" in done.stdout and "user: is case 0 covered?" in done.stdout
