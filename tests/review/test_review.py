"""Drafted rows wait for people: what is looked at, why a draft is refused, and words that come back."""

from __future__ import annotations

import csv
import io
import json
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command import ratchet as run
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import scaled
from places import make_repository, use_git_without_a_user, write_files

from ratchet.config.data import ReviewConfig
from ratchet.config.params import Config
from ratchet.data.examples import Message, example_id
from ratchet.errors import DataError, ServiceError, UserError
from ratchet.review.files import export_rows, guard, import_rows, unguard
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Decision, DraftFigures, Item, with_answer
from ratchet.review.store import FILE
from ratchet.sources.reviewed import harvest, mark_taken
from tasks.ingest import add_batch, pull

ROOT = Path(__file__).parents[2]
BOUND = 0.1


def item(number: int | str, *doubts: str, draft: str = "d", answer: str | None = None, **more: Any) -> Item:
    messages = (
        Message("user", f"What is {number}?"),
        Message("assistant", f"It is {number}." if answer is None else answer),
    )
    return Item(example_id(messages), draft, more.pop("kind", "synthetic"), messages, doubts=doubts, **more)


def say(queue: ReviewQueue, row: Item, verdict: str, answer: str = "", by: str = "Ana", **more: Any) -> None:
    queue.decide(
        Decision(
            row.id, row.draft, verdict, with_answer(row, answer) if verdict == "edit" else (), by=by, **more
        )
    )


def accept_all(queue: ReviewQueue) -> None:
    queue.decide_all([Decision(row.id, row.draft, "accept", by="Ana") for row in queue.pending(limit=10_000)])


@pytest.fixture
def queue(tmp_path):
    opened = ReviewQueue(tmp_path)
    yield opened
    opened.close()


# --- the queue ----------------------------------------------------------------------------------------------


def test_the_file_is_its_owners_alone(tmp_path, queue):
    queue.add([item(1)], share=1)
    files = list((tmp_path / ".ratchet").glob("review.db*"))
    assert (tmp_path / FILE) in files
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_adding_twice_adds_nothing_and_forgets_no_word(queue):
    rows = [item(number) for number in range(20)]
    assert queue.add([*rows, rows[0]], share=1) == 20
    say(queue, rows[0], "reject")
    assert queue.add(rows, share=1) == 0
    assert queue.get("d", rows[0].id).decision.verdict == "reject"
    assert queue.add([item(number, draft="other") for number in range(20)], share=1) == 20


def test_doubtful_rows_come_first_then_a_sample_and_no_other(queue):
    rows = [item(number, *(("short",) if number % 50 == 49 else ())) for number in range(400)]
    queue.add(rows, share=0.1)
    pending = queue.pending(limit=1000)
    assert [row.id for row in pending[:8]] == [row.id for row in rows if row.doubts]
    assert 20 < len(pending) - 8 < 65  # binomial, 392 rows
    assert queue.waiting() == len(pending)
    assert [row.id for row in queue.pending(limit=3)] == [row.id for row in pending[:3]]


def test_the_sample_is_the_same_whatever_the_order_and_wider_for_a_larger_share(tmp_path):
    found = []
    for share, step in ((0.1, 1), (0.1, -1), (0.3, 1)):
        queue = ReviewQueue(tmp_path / f"{share}{step}")
        queue.add([item(number) for number in range(300)[::step]], share=share)
        found.append({row.id for row in queue.pending(limit=1000)})
        queue.close()
    assert found[0] == found[1] < found[2]


def test_a_small_draft_has_a_sample_of_one_unless_nobody_wants_any(queue):
    queue.add([item(number) for number in range(3)], share=1e-9)
    assert len(queue.pending("d")) == 1
    queue.add([item(number, draft="unseen") for number in range(3)], share=0)
    assert queue.pending("unseen") == []
    assert [row["meta"]["review"] for row in queue.outcome("unseen", max_rejects=BOUND).rows] == [
        "unseen"
    ] * 3


def test_a_later_decision_replaces_an_earlier_one_and_the_history_has_both(queue):
    row = item(1, "short")
    queue.add([row], share=0)
    say(queue, row, "accept", by="Ana", why="fine")
    say(queue, row, "edit", "Better.", by="Ben")
    assert queue.get("d", row.id).decision.messages == with_answer(row, "Better.")
    queue.undo(row.id, "d", by="Ben")
    assert queue.pending() == [row]
    assert [(word.verdict, word.by, word.why) for word in queue.history(row.id, "d")] == [
        ("accept", "Ana", "fine"),
        ("edit", "Ben", ""),
        ("undo", "Ben", ""),
    ]
    with pytest.raises(UserError, match="nothing was decided"):
        queue.undo(row.id, "d", by="Ben")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": "0" * 32}, "holds no row '000"),
        ({"draft": "other"}, "the draft 'other' holds no row"),
        ({"verdict": "maybe"}, "the verdict is 'maybe'; wanted: accept, reject, edit"),
        ({"verdict": "edit"}, "the edit is no valid conversation: the row has no messages"),
        (
            {"verdict": "edit", "messages": (Message("user", "a"), Message("assistant", " "))},
            "the edit is no valid conversation",
        ),
        ({"by": "  "}, "nobody is named"),
        ({"by": "Ana\nBen"}, "cannot be kept"),
        ({"by": "Ana\u202e"}, "cannot be kept"),
        ({"by": "A" * 81}, "cannot be kept"),
    ],
)
def test_a_decision_that_cannot_stand_is_refused_and_with_it_all_that_came_along(queue, change, message):
    row, other = item(1, "short"), item(2, "short")
    queue.add([row, other], share=0)
    values = {"item": row.id, "draft": "d", "verdict": "accept", "by": "Ana"} | change
    with pytest.raises(UserError, match=message):
        queue.decide_all([Decision(other.id, "d", "accept", by="Ana"), Decision(**values)])
    assert queue.waiting() == 2


def test_an_edit_that_changes_nothing_is_an_acceptance(queue):
    row = item(1, "short")
    queue.add([row], share=0)
    say(queue, row, "edit", " It is 1.\r\n")
    assert queue.get("d", row.id).decision.verdict == "accept"


def test_what_is_no_conversation_can_be_mended_or_rejected_but_not_accepted(queue):
    """Rows in quarantine: without an answer, with half of a surrogate pair."""
    bare = Item("a" * 32, "q", "quarantine", (Message("user", "What?"),), doubts=("no_answer",))
    torn = Item(
        "b" * 32,
        "q",
        "quarantine",
        (Message("user", "What?"), Message("assistant", "\ud800")),
        doubts=("invalid_unicode",),
    )
    queue.add([bare, torn], share=0)
    for row in (bare, torn):
        with pytest.raises(UserError, match="as drafted it is no valid conversation"):
            say(queue, row, "accept")
    assert queue.pending() == [bare, torn]
    say(queue, bare, "edit", "That.")
    say(queue, torn, "reject")
    outcome = queue.outcome("q", max_rejects=BOUND)
    assert [row["messages"][-1]["content"] for row in outcome.rows] == ["That."]
    assert outcome.left_out == {"rejected": 1}


def test_unseen_rows_that_are_no_conversation_are_left_out_and_counted(queue):
    queue.add(
        [Item("a" * 32, "q", "quarantine", (Message("user", "What?"),)), item(1, "short", draft="q")], share=0
    )
    accept_all(queue)
    assert queue.outcome("q", max_rejects=BOUND).left_out == {"no_answer": 1}


def test_rows_are_found_by_how_their_id_begins(queue):
    rows = [item(number) for number in range(40)]
    queue.add(rows, share=1)
    assert queue.find(rows[3].id[:12]).item == rows[3]
    with pytest.raises(UserError, match="no row '%' is there"):
        queue.find("%")
    first = next(row.id[0] for row in rows if sum(other.id[0] == row.id[0] for other in rows) > 1)
    with pytest.raises(UserError, match=rf"rows begin with '{first}'"):
        queue.find(first)


def test_a_name_of_any_script_is_kept(queue):
    row = item(1, "short")
    queue.add([row], share=0)
    say(
        queue, row, "accept", by=" \u0639\u0644\u06cc\u200c\u0631\u0636\u0627 "
    )  # with a zero-width non-joiner
    assert queue.get("d", row.id).decision.by == "\u0639\u0644\u06cc\u200c\u0631\u0636\u0627"


def test_many_may_open_a_file_that_is_not_there_yet(tmp_path):
    start = threading.Barrier(8)

    def add(number: int) -> int:
        queue = ReviewQueue(tmp_path)
        start.wait()
        try:
            return queue.add([item(number), item("the same")], share=1)
        finally:
            queue.close()

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(add, range(8))) == 9


def test_a_file_that_is_no_database_is_told_in_one_sentence(tmp_path):
    write_files(tmp_path, {str(FILE): "no database" * 100})
    queue = ReviewQueue(tmp_path)
    with pytest.raises(ServiceError, match=r"review\.db cannot be used"):
        queue.pending()
    queue.close()


# --- what becomes of a draft --------------------------------------------------------------------------------


def test_a_draft_waits_for_every_row_that_has_to_be_seen(queue):
    rows = [item(1, "short"), *(item(number) for number in range(2, 6))]
    queue.add(rows, share=1)
    for row in rows[1:]:
        say(queue, row, "accept")
    with pytest.raises(UserError, match="1 rows of the draft 'd' wait"):
        queue.outcome("d", max_rejects=BOUND)
    say(queue, rows[0], "accept")
    assert len(queue.outcome("d", max_rejects=BOUND).rows) == 5


def test_rows_carry_where_they_came_from_and_who_was_heard(queue):
    rows = [
        item(1, "short", meta={"teacher": "t", "kind": "faq"}),
        item(2, "short"),
        item(3, "short"),
        item(4),
    ]
    queue.add(rows, share=0)
    say(queue, rows[0], "accept", by="Ana")
    say(queue, rows[1], "edit", "Two.", by="Ben")
    say(queue, rows[2], "reject", by="Cleo")
    outcome = queue.outcome("d", max_rejects=BOUND)

    assert [row["meta"] for row in outcome.rows] == [
        {"kind": "faq", "teacher": "t", "draft": "d", "review": "accepted"},
        {"kind": "synthetic", "draft": "d", "review": "edited", "drafted_as": rows[1].id},
        {"kind": "synthetic", "draft": "d", "review": "unseen"},
    ]
    assert outcome.rows[1]["messages"] == [
        {"role": "user", "content": "What is 2?"},
        {"role": "assistant", "content": "Two."},
    ]
    assert (outcome.reviewers, outcome.left_out) == (["Ana", "Ben", "Cleo"], {"rejected": 1})


@pytest.mark.parametrize("verdict", ["reject", "edit"])
@pytest.mark.parametrize(("bad", "refused"), [(2, False), (3, True)])
def test_a_sample_over_the_bound_refuses_the_draft_whole(queue, verdict, bad, refused):
    rows = [item(number) for number in range(20)]
    queue.add(rows, share=1)
    accept_all(queue)
    for row in rows[:bad]:
        say(queue, row, verdict, "Another.")
    if refused:
        with pytest.raises(
            UserError,
            match=r"(?s)refused whole: 3 of the 20 rows of its sample .*\(15%\), wanted at most 10%"
            r".*review\.max_rejects",
        ):
            queue.outcome("d", max_rejects=BOUND)
    else:
        assert len(queue.outcome("d", max_rejects=BOUND).rows) == (18 if verdict == "reject" else 20)


def test_doubtful_rows_speak_for_themselves_alone(queue):
    """They were chosen because they looked bad: their rejects say nothing of the others."""
    doubtful, clear = (
        [item(number, "short") for number in range(5)],
        [item(number) for number in range(5, 15)],
    )
    queue.add([*doubtful, *clear], share=1)
    accept_all(queue)
    for row in doubtful:
        say(queue, row, "reject")
    assert len(queue.outcome("d", max_rejects=0).rows) == 10


def test_a_draft_that_was_taken_gives_the_same_rows_or_none(queue):
    rows = [item(number) for number in range(20)]
    queue.add(rows, share=1)
    accept_all(queue)
    outcome = queue.outcome("d", max_rejects=BOUND)
    queue.mark_taken("d", "batch.jsonl", content=outcome.content)
    assert queue.outcome("d", max_rejects=BOUND) == outcome
    say(queue, rows[0], "reject")
    with pytest.raises(UserError, match=r"is the batch batch\.jsonl already, with other rows"):
        queue.outcome("d", max_rejects=BOUND)


def test_a_word_between_the_outcome_and_its_batch_is_noticed(queue):
    rows = [item(number) for number in range(20)]
    queue.add(rows, share=1)
    accept_all(queue)
    outcome = queue.outcome("d", max_rejects=BOUND)
    say(queue, rows[0], "reject")
    queue.mark_taken("d", "batch.jsonl", content=outcome.content)
    with pytest.raises(UserError, match="with other rows"):
        queue.outcome("d", max_rejects=BOUND)


def test_drafts_are_told_with_their_figures(queue):
    rows = [item(1, "short"), item(2, "short"), item(3, "short"), item(4)]
    queue.add(rows, share=1)
    queue.add([item(1, "x", draft="e", kind="feedback")], share=1)
    for row, verdict in zip(rows, ("accept", "reject", "edit"), strict=False):
        say(queue, row, verdict, "Other.")
    counts = {
        "items": 4,
        "doubtful": 3,
        "sampled": 1,
        "waiting": 1,
        "decided": 3,
        "accepted": 1,
        "rejected": 1,
        "edited": 1,
    }
    expected = DraftFigures(name="d", kind="synthetic", **counts, taken=False, batch="")
    assert queue.drafts()[0] == expected
    accept_all(queue)
    queue.mark_taken("e", "b.jsonl")
    assert [(draft.name, draft.taken, draft.batch) for draft in queue.drafts()] == [
        ("d", False, ""),
        ("e", True, "b.jsonl"),
    ]
    for ask in (lambda: queue.outcome("nothing", max_rejects=0), lambda: queue.mark_taken("nothing", "b")):
        with pytest.raises(UserError, match=r"(?s)no draft is named 'nothing'.*known: d, e"):
            ask()


# --- the source ---------------------------------------------------------------------------------------------


def filled(root: Path, **drafts: list[Item]) -> None:
    queue = ReviewQueue(root)
    for rows in drafts.values():
        queue.add(rows, share=1)
    queue.close()


def test_all_drafts_that_are_ready_come_and_the_others_are_named(tmp_path, capsys):
    filled(tmp_path, a=[item(1, draft="a")], b=[item(2, draft="b")], c=[item(3, draft="c")])
    queue = ReviewQueue(tmp_path)
    for name in "ab":
        for row in queue.pending(name):
            say(queue, row, "accept", by=f"who {name}")
    queue.close()
    pulled = pull(Config(), root=tmp_path, source="review")
    assert [json.loads(line)["meta"]["draft"] for line in pulled.lines] == ["a", "b"]
    assert (pulled.source, pulled.label, pulled.form, pulled.reviewers) == (
        "review",
        "a-b",
        "messages",
        ("who a", "who b"),
    )
    assert "not ready: 1 rows of the draft 'c' wait" in capsys.readouterr().err
    assert len(pull(Config(), root=tmp_path, draft="b").lines) == 1
    with pytest.raises(UserError, match="1 rows of the draft 'c' wait"):
        pull(Config(), root=tmp_path, draft="c")
    with pytest.raises(DataError, match="a draft is named"):
        pull(Config(), root=tmp_path, source="pydoc", draft="b")


def test_a_draft_of_a_batch_of_several_is_known_again(tmp_path):
    filled(tmp_path, a=[item(1, draft="a")], b=[item(2, draft="b")])
    queue = ReviewQueue(tmp_path)
    accept_all(queue)
    queue.close()
    pulled = pull(Config(), root=tmp_path, source="review")
    batch, new = add_batch(tmp_path / "raw", pulled, licence="", who="Ana")
    assert new
    mark_taken(tmp_path, pulled.drafts, batch.name)
    again = pull(Config(), root=tmp_path, draft="b")
    assert add_batch(tmp_path / "raw", again, licence="", who="Ana") == (batch, False)
    with pytest.raises(UserError, match="no draft is ready"):
        harvest(tmp_path, ReviewConfig())


def test_a_draft_without_an_accepted_row_is_not_ready(tmp_path):
    filled(tmp_path, a=[item(1, "short", draft="a")])
    queue = ReviewQueue(tmp_path)
    say(queue, queue.pending()[0], "reject")
    queue.close()
    with pytest.raises(UserError, match="no row of the draft 'a' was accepted"):
        harvest(tmp_path, ReviewConfig(), "a")


@pytest.mark.e2e
def test_the_batch_and_its_commit_name_who_reviewed(tmp_path, monkeypatch):
    from prefect.testing.utilities import prefect_test_harness

    from ratchet.data.batches import read_manifest
    from ratchet.pipeline.checkout import git

    use_git_without_a_user(monkeypatch)
    monkeypatch.delenv("RATCHET_CONSOLE", raising=False)
    root = make_repository(tmp_path / "checkout")
    filled(root, a=[item(number, "short", draft="a") for number in range(5)])
    queue = ReviewQueue(root)
    for row, name in zip(queue.pending(), ["Ben", "Cleo", "Ben", "Cleo", "Ben"], strict=True):
        say(queue, row, "accept", by=name)
    with prefect_test_harness(server_startup_timeout=int(scaled(120))):
        from flows.ingest import ingest

        done = ingest(root=str(root), draft="a")
        again = ingest(root=str(root), draft="a")
    assert (done["rows"], done["new"], again["new"]) == (5, True, False)
    assert git(root, "log", "-1", "--format=%b").split("\n")[:3] == [
        f"Batch: {done['batch']}",
        "Reviewed-by: Ben",
        "Reviewed-by: Cleo",
    ]
    assert read_manifest(root / "data/raw")[0].who == "Ben, Cleo"
    assert queue.drafts()[0].batch == done["batch"]
    queue.close()


# --- files --------------------------------------------------------------------------------------------------

anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["=1+1", " =1", "' =1", "'=1", "''", "' -1", "@x", "\t", "'", "a\r\nb", '"', ";", "＝1", "\x00"]
)


@given(anything)
def test_a_cell_comes_back_as_it_was_and_is_no_formula(cell):
    guarded = guard(cell)
    assert unguard(guarded) == cell
    assert guarded.lstrip(" ")[:1] not in set("=+-@\t\r\n＝＋－＠")
    assert guard(guarded)[:1] != "=" and unguard(guard(guarded)) == guarded


def fill(path: Path, words: dict[str, tuple[str, str | None]]) -> None:
    """As a person would: id → (word, answer or None for the drafted one)."""
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
        for row in rows:
            word, answer = words.get(row["id"], ("", None))
            row |= {"review": word} | ({} if answer is None else {"answer": guard(answer)})
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(out.getvalue().encode())
        return
    found = (
        json.loads(path.read_bytes())
        if path.suffix == ".json"
        else [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    )
    for row in found:
        word, answer = words.get((row.get("data") or row)["id"], ("", None))
        if path.suffix == ".jsonl":
            row |= {"review": word} | ({} if answer is None else {"answer": answer})
        else:  # as Label Studio 1.x exports it
            regions = (
                [
                    {
                        "from_name": "review",
                        "to_name": "question",
                        "type": "choices",
                        "value": {"choices": [word]},
                    }
                ]
                if word
                else []
            )
            regions += (
                []
                if answer is None
                else [
                    {
                        "from_name": "answer",
                        "to_name": "question",
                        "type": "textarea",
                        "value": {"text": [answer]},
                    }
                ]
            )
            cancelled = {
                "was_cancelled": True,
                "result": [{"from_name": "review", "value": {"choices": ["reject"]}}],
            }
            row |= {
                "id": 7,
                "annotations": [cancelled, {"was_cancelled": False, "completed_by": 1, "result": regions}],
                "predictions": [],
            }
    path.write_bytes(
        json.dumps(found).encode()
        if path.suffix == ".json"
        else b"\n".join(json.dumps(row).encode() for row in found)
    )


content = anything.filter(lambda text: text.strip() and "\x00" not in text)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["rows.csv", "rows.jsonl", "rows.json"]),
    st.lists(
        st.tuples(content, content, anything, st.sampled_from(["accept", "reject", "edit", ""])),
        min_size=1,
        max_size=5,
    ),
)
def test_every_word_comes_back_from_a_file(name, drafted):
    with tempfile.TemporaryDirectory() as folder:
        queue, path = ReviewQueue(Path(folder)), Path(folder) / name
        rows = []
        for place, (question, answer, passage, _) in enumerate(drafted):
            messages = (
                Message("system", str(place)),
                Message("user", question),
                Message("assistant", answer),
            )
            rows.append(
                Item(example_id(messages), "=d", "synthetic", messages, passage=passage, doubts=("@doubt",))
            )
        queue.add(rows, share=0)
        export_rows(path, queue.pending(), label_studio=path.suffix == ".json")
        fill(
            path,
            {
                row.id: (word, f"{answer} or not" if word == "edit" else None)
                for row, (_, answer, _, word) in zip(rows, drafted, strict=True)
            },
        )
        done = import_rows(path, queue, by="Ana")

        assert done.empty == sum(not word for *_, word in drafted)
        for row, (_, answer, _, word) in zip(rows, drafted, strict=True):
            decision = queue.get("=d", row.id).decision
            assert (decision.verdict if decision else "") == word
            if word == "edit":
                assert example_id(decision.messages) == example_id(with_answer(row, f"{answer} or not"))
        assert import_rows(path, queue, by="Ben").known == sum(bool(word) for *_, word in drafted)
        queue.close()


def test_every_fault_of_a_file_is_named_and_nothing_is_imported(tmp_path, queue):
    rows = [item(number, "short") for number in range(6)]
    queue.add(rows, share=0)
    lines = [
        {"id": rows[0].id, "draft": "d", "review": "accept"},
        {"id": "nobody", "draft": "d", "review": "accept"},
        {"id": rows[1].id, "draft": "d", "review": "okay"},
        {"id": rows[2].id, "draft": "d", "review": "edit", "answer": " "},
        {"id": rows[3].id, "draft": "d", "review": "accept", "answer": "Another."},
        {"id": rows[4].id, "draft": "d", "review": "accept", "question": "Changed?"},
        {"id": rows[5].id, "draft": "d", "review": "accept"},
        {"id": rows[5].id, "draft": "d", "review": "Reject"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError) as refused:
        import_rows(path, queue, by="Ana")
    told = str(refused.value)
    assert "rows.jsonl has 6 faults, nothing was imported" in told
    for words in (
        "1 unknown ids: 'nobody' in line 2",
        "1 unknown words (known: accept, reject, edit): 'okay' in line 3",
        "1 edits without an answer",
        "1 rows that are accepted and",
    ):
        assert words in told
    assert "1 rows whose question was changed" in told and "1 rows with two different words: line 8" in told
    assert queue.waiting() == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "id,review\nx,\xe9".encode("latin-1"), "is no UTF-8"),
        ("rows.csv", b"id,word\nx,accept\n", "has no column 'review'"),
        ("rows.csv", b'id,review\n"x,accept\n', "is no CSV"),
        ("rows.jsonl", b"[1]\n", r"rows\.jsonl, line 1 is no JSON object"),
        ("rows.json", b'[{"id": 1, "review": "accept"}]', "(?s)no export of Label Studio's.*JSON-MIN"),
        ("rows.xlsx", b"", "has the suffix '.xlsx'"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, queue, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_rows(tmp_path / name, queue, by="Ana")


def test_an_export_overwrites_nobodys_words(tmp_path, queue):
    (tmp_path / "rows.csv").write_text("filled in")
    with pytest.raises(UserError, match="is there already"):
        export_rows(tmp_path / "rows.csv", [item(1)])
    with pytest.raises(UserError, match=r"wanted \.csv or \.jsonl"):
        export_rows(tmp_path / "rows.txt", [item(1)])


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def ratchet(tmp_path, monkeypatch):
    use_git_without_a_user(monkeypatch)
    root = make_repository(tmp_path / "checkout")

    def call(*arguments: str, code: int = 0) -> str:
        done = run("-C", root, "review", *arguments)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    call.root = root  # type: ignore[attr-defined]
    return call


def test_rows_are_reviewed_from_the_command_line(ratchet):
    rows = [item(number, "short\x1b[2J") for number in range(4)]
    filled(ratchet.root, d=rows)
    told = ratchet("next")
    assert f"{rows[0].id[:12]} of d (synthetic); 4 wait" in told and "assistant: It is 0." in told
    assert "\x1b" not in told and "doubt: short\\x1b[2J" in told

    assert "3 wait" in ratchet("accept", rows[0].id[:12])
    ratchet("reject", rows[1].id, "--why", "wrong", "--by", "Ben")
    ratchet("edit", rows[2].id, "--answer", "Two.", "--by", "Cleo")
    assert "1 rows of the draft 'd' wait" in ratchet("status")
    queue = ReviewQueue(ratchet.root)
    kept = [queue.get("d", row.id).decision for row in rows[:3]]
    queue.close()
    assert [(word.verdict, word.by, word.why) for word in kept] == [
        ("accept", "Ana", ""),
        ("reject", "Ben", "wrong"),
        ("edit", "Cleo", ""),
    ]

    ratchet("undo", rows[1].id)
    assert json.loads(ratchet("next", "--json"))["waiting"] == 2
    assert "no row 'zzz' is there" in ratchet("accept", "zzz", code=2)


def test_a_file_goes_out_and_comes_back_on_the_command_line(ratchet, tmp_path):
    rows = [item(number, "short") for number in range(3)]
    filled(ratchet.root, d=rows)
    path = tmp_path / "rows.csv"
    ratchet("export", str(path))
    fill(path, {rows[0].id: ("Accept", None), rows[1].id: ("edit", "One.")})
    assert (
        ratchet("import", str(path), "--by", "Ben")
        == "1 accepted, 0 rejected, 1 edited; 0 known already, 1 undecided\n"
    )
    told = ratchet("export", str(tmp_path / "tasks.json"), "--label-studio")
    assert told.startswith("<View>") and '<Choice value="edit"/>' in told
    assert [task["data"]["id"] for task in json.loads((tmp_path / "tasks.json").read_bytes())] == [rows[2].id]
    ratchet("reject", rows[2].id)
    assert (
        "d (synthetic): 3 rows, 3 doubtful" in (told := ratchet("status"))
        and "ready: 2 rows, ratchet ingest --source review --draft d" in told
    )
    assert "nothing waits" in ratchet("export", str(tmp_path / "more.csv"), code=2)
