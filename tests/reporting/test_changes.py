"""The comment on a pull request: what it says, and that no text from data can leave its place in it."""

from __future__ import annotations

import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import cmarkgfm
import msgspec
import pytest
from cmarkgfm.cmark import Options
from command import ratchet
from places import commit, use_git_without_a_user
from small_checkout import add, commit_batches, make, make_checkout, row

from ratchet.data.profile import BatchProfile, Counts, Profile
from ratchet.files import write_bytes, write_json
from ratchet.pipeline.checkout import git
from ratchet.promotion.plain_words import tell_verdict
from ratchet.promotion.verdict import Candidate, Check, Rival, Verdict
from ratchet.reporting.changes import MARKER, MOST_CHARACTERS, Changes, Cost, Side, inert, render_changes
from ratchet.reporting.forest import FOREST, draw_forest

HOSTILE = [
    "<!-- ratchet changes -->",
    "--> <script>alert(1)</script>",
    "</details></table><h1>Approved</h1>",
    "<img src=x onerror=alert(1)> <a href='javascript:x'>y</a>",
    "![pixel](https://evil.example/p.png) [click](https://evil.example)",
    "https://evil.example www.evil.example mailto:a@b.example a@b.example",
    "@everyone @octocat org/repo#1 #1 GH-1 deadbeefdeadbeefdeadbeefdeadbeefdeadbeef",
    "`code` ``more`` ```fence``` ~~~",
    "a | b | c \\| d \\\\| e \\",
    "line\n\n# heading\n\n- [x] done\n\n|x|y|\n|---|---|\n```\n",
    "\u202eright to left\u202c \u2066isolated\u2069 \u200bzero\ufeff \u0000\u0007\x1b[31m",
    "&lt;b&gt; &#64;octocat &copy;",
    "$x$ $$y$$ $`z`$ :rocket: **bold** _it_ ~~gone~~ [^1] > quote",
    "x" * 100_000,
    " ",
    "`",
    "\\",
    "\ud800half",
]


class Elements(HTMLParser):
    """The elements of a page in order, with the texts of code and of everything else, links and images."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.code: list[str] = []
        self.words = ""
        self.comments: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        self.code += [""] if tag == "code" else []

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "code" in self._open:
            self.code[-1] += data
        else:
            self.words += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def render(markdown: str) -> Elements:
    """As GitHub's own parser renders it, with HTML left in: GitHub's filters come only after it."""
    return Elements(cmarkgfm.github_flavored_markdown_to_html(markdown, options=Options.CMARK_OPT_UNSAFE))


def profile_with(text: str) -> Profile:
    counts = {"rows": 9, "accepted": {"rows": 5, "train": 5}, "duplicate": {"rows": 1, "exact": 1}}
    rejected = {"rows": 3, "empty": 2, text or "?": 1}
    batch = BatchProfile(
        **counts,
        rejected=rejected,
        sanitised={},
        characters_under={},
        languages_of_the_first={text: 5},
        answers={text: 5},
        label_shift=0.2,
    )
    return Profile(
        total=Counts(**counts, rejected=rejected),
        golden=1,
        kinds={"train": {text: 4, "other": 1}, "validation": {}, "test": {}},
        sources={text: 4, "jsonl": 1},
        batches={text: batch},
    )


def changes_with(text: str) -> Changes:
    check = Check(f"past:{text}", text, 10, "fail", text, 0.1, -0.1, 0.2, 0.0)
    verdict = Verdict("reject", [text], Rival("champion", 3), [check], Candidate("k", "s"))
    return Changes(
        since=text,
        head=text,
        before=Side(None, text),
        after=Side(profile_with(text), text, [text], {text or "?": text}),
        settings=[(text, text, text)],
        fault="",
        stages=[text],
        then=[text],
        cost=Cost(last_seconds=60, last_rows=5, rows=10, measured=[text], seconds=120.0, why=text),
        verdict=verdict,
        waiting=2,
    )


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:24]))
def test_no_text_from_data_can_leave_its_place(text):
    harmless, found = (
        render(render_changes(changes_with(each), "https://here.example/{path}"))
        for each in ("harmless", text)
    )
    if inert(text) != "(empty)":
        assert found.tags == harmless.tags, "the same elements in the same order"
    assert found.words.replace("(empty)", "") == harmless.words, "nothing outside code but our own words"
    assert (found.comments, found.addresses) == (harmless.comments, harmless.addresses)
    assert found.comments == [" ratchet changes "]
    assert not re.search(r"[^\x20-\x7e\n]", "".join(found.code).replace("…", "").replace("¦", "")), "visible"


def test_the_comment_stays_within_what_github_takes_and_keeps_its_first_line():
    found = changes_with("x" * 400)
    many = msgspec.structs.replace(
        found,
        settings=[(f"key{number}" * 30, "a" * 500, "b" * 500) for number in range(10_000)],
        after=msgspec.structs.replace(found.after, said=["long " * 200] * 5_000),
    )
    text = render_changes(many)
    assert len(text) <= MOST_CHARACTERS
    assert text.startswith(MARKER + "\n")


@pytest.mark.parametrize("name", ["$\\frac{", "\u202eabc", "日本", "a" * 500])
def test_a_forest_plot_takes_any_name_and_is_the_same_each_time(name):
    checks = [
        Check(f"past:{name}", name, 10, "pass", "", 0.1, -0.1, 0.2, 0.0),
        Check("success", "exact_match", 10, "unclear", "", 0.1, -0.1, 0.2, 0.0),
        Check("finite", "", 0, "fail", "no figures"),
    ]
    verdict = Verdict("reject", [], Rival("base", None), checks, Candidate("k", "s"))
    image = draw_forest(verdict)
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and image == draw_forest(verdict)
    width, height = struct.unpack(">II", image[16:24])
    assert 700 < width < 1200 and 150 < height < 800


def test_a_verdict_without_figures_gives_an_image_too():
    verdict = Verdict("uncertain", [], Rival("base", None), [], Candidate("k", "s"))
    assert draw_forest(verdict)[:4] == b"\x89PNG"


# --- the command, on a checkout with batches ---


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("changes") / "small"
    with pytest.MonkeyPatch.context() as patch:
        use_git_without_a_user(patch)
        make_checkout(path, {"data/golden.jsonl": "", "data/forgotten.jsonl": ""})
        add(path / "data/raw", [row(number) for number in range(60)])
        commit_batches(path, "Ingest the first month")
        make(path)
        git(path, "tag", "first")
    return path


@pytest.fixture
def branch(checkout, monkeypatch):
    use_git_without_a_user(monkeypatch)
    git(checkout, "switch", "--quiet", "--force-create", "proposal", "main")
    yield checkout
    git(checkout, "reset", "--quiet", "--hard")
    git(checkout, "switch", "--quiet", "main")


def test_a_new_batch_shows_rows_reasons_and_stages_but_no_text_of_a_row(branch):
    leak = "confidential words that stay with the data"
    bad = json.dumps({"question": leak, "answer": ""}).encode()
    name = add(branch / "data/raw", [*(row(number) for number in range(60, 90)), row(3), bad], month=2)
    commit_batches(branch, "Ingest the second month")
    head = git(branch, "rev-parse", "HEAD")
    done = ratchet("-C", branch, "changes", "--since", "first")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(MARKER)
    assert "| in batches | 60 | 92 |" in done.stdout
    assert "| **accepted** | 60 | 90 |" in done.stdout
    assert f"| `{name}` | 32 | 30 | 1 | 1 |" in done.stdout
    assert f"`{name}:32`" in done.stdout, "where the first rejected row stands"
    assert "`prepare`" in done.stdout and "`train`" in done.stdout
    assert leak not in done.stdout + done.stderr
    assert git(branch, "rev-parse", "HEAD") == head
    assert git(branch, "status", "--porcelain") == ""
    found = json.loads(ratchet("-C", branch, "changes", "--since", "first", "--json").stdout)
    assert found["after"]["profile"]["total"]["rows"] == 92


def test_a_batch_that_would_fail_is_told_with_its_reasons(branch):
    bad = [json.dumps({"question": f"secret {number}", "answer": ""}).encode() for number in range(60)]
    add(branch / "data/raw", bad, month=3)
    commit_batches(branch, "Ingest a broken month")
    done = ratchet("-C", branch, "changes", "--since", "main")
    assert done.returncode == 0, done.stderr
    assert "A retraining would fail" in done.stdout and "60 of 60 rows" in done.stdout
    assert "secret 1" not in done.stdout


def test_settings_are_shown_before_and_after(branch):
    params = (branch / "params.yaml").read_text()
    (branch / "params.yaml").write_text(params + "train:\n  epochs: 7.0\n")
    commit(branch, "Train longer")
    done = ratchet("-C", branch, "changes", "--since", "main")
    assert "| `train.epochs` | `3.0` | `7.0` |" in done.stdout, done.stderr
    assert "| in batches | 60 | 60 |" in done.stdout


def test_a_params_file_that_cannot_be_read_is_told(branch):
    (branch / "params.yaml").write_text("train:\n  epochs: '<b>@octocat</b>'\n")
    commit(branch, "Break it")
    done = ratchet("-C", branch, "changes", "--since", "main")
    assert done.returncode == 0, done.stderr
    assert "**params.yaml cannot be read:**" in done.stdout
    page = render(done.stdout)
    assert "b" not in page.tags and "@octocat" not in page.words and "@octocat" in "".join(page.code)


def test_what_the_other_side_got_later_is_no_change(branch):
    common = git(branch, "rev-parse", "main").strip()
    git(branch, "switch", "--quiet", "--force-create", "ahead", "main")
    with (branch / "params.yaml").open("a") as params:
        params.write("train:\n  epochs: 7\n")
    commit(branch, "Train longer")
    git(branch, "switch", "--quiet", "proposal")
    found = json.loads(ratchet("-C", branch, "changes", "--since", "ahead", "--json").stdout)
    assert (found["since"], found["settings"]) == (common, [])


def test_a_commit_that_is_not_there_is_refused(branch):
    done = ratchet("-C", branch, "changes", "--since", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'nowhere' names no commit here" in done.stderr
    assert "git fetch" in done.stderr


def test_a_new_verdict_comes_first_with_its_image(branch):
    checks = [Check("success", "exact_match", 40, "pass", "better", 0.2, 0.1, 0.3, 0.0)]
    verdict = Verdict("promote", ["better for certain"], Rival("base", None), checks, Candidate("k", "s"))
    write_json(branch / "reports/gate.json", msgspec.to_builtins(verdict))
    write_bytes(branch / FOREST, [draw_forest(verdict)])
    commit(branch, "Retrain")
    done = ratchet(
        "-C", branch, "changes", "--since", "main", "--image", "https://here.example/{path}?raw=true"
    )
    page = render(done.stdout)
    first, _, heading = done.stdout.splitlines()[1:4]
    assert (first, heading) == (tell_verdict(verdict), "## ✅ promote"), done.stderr
    assert page.addresses == ["https://here.example/reports/gate.png?raw=true"]
    assert "+0.200 [+0.100, +0.300]" in page.words
