"""The page /review: over HTTP, and in a real headless Chromium against a real gateway."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from contrast import CONTRAST
from media_models import name_of, picture, sound, write_shard
from patience import scaled
from served import Gateway, running_gateway

from ratchet.data.examples import MEDIA_MARK, Message, example_id
from ratchet.gateway.auth import add_key
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Decision, Item

SIZES = {"phone": (390, 844), "desk": (1280, 900)}
SCRIPT = "<script>document.title = 'taken over'</script><img src=x onerror=\"document.title='taken over'\">"
PASSAGE = (
    "Returns. Goods can be sent back within 30 days of delivery. The refund is paid to the card that was"
    " charged, at most five working days after the parcel reached us.\n\nSale articles are exchanged, never"
    " refunded. Freight is borne by the customer unless the article was faulty."
)
ROWS = [
    ("How long can I send an article back?", "Within 30 days of delivery.", PASSAGE, ()),
    (
        "When is the refund paid?",
        "On the same day.",
        PASSAGE,
        (
            "the answer is not in the passage",
            "a shorter answer of the same question is in the batch of March",
        ),
    ),
    (f"What does {SCRIPT} do?", f"{SCRIPT} does nothing.", f"It is text: {SCRIPT}", (SCRIPT,)),
    ("Are sale articles refunded?", "Sale articles are exchanged, never refunded.", PASSAGE, ()),
    ("x" * 400, "y" * 400, "z" * 400, ()),
]


def items(draft: str = "faq-20261125T184500Z") -> list[Item]:
    made = []
    for question, answer, passage, doubts in ROWS:
        messages = (Message("user", question), Message("assistant", answer))
        made.append(
            Item(
                example_id(messages),
                draft,
                "synthetic",
                messages,
                passage,
                {"teacher": "pydoc-helper@v3", "document": "returns.md", "chunk": 4},
                doubts,
            )
        )
    return made


def fill(root: Path) -> list[Item]:
    """In the order in which they are shown: those with doubts first."""
    shutil.rmtree(root / ".ratchet/review.db", ignore_errors=True)
    queue = ReviewQueue(root)
    queue.add(items(), share=1)
    shown = queue.pending()
    queue.close()
    return shown


def decisions(root: Path) -> dict[str, Decision | None]:
    queue = ReviewQueue(root)
    found = {entry.item.id: entry.decision for draft in queue.drafts() for entry in queue.entries(draft.name)}
    queue.close()
    return found


@pytest.fixture
def gateway(tmp_path) -> Iterator[Gateway]:
    with running_gateway(tmp_path, version=None) as running:
        yield running


def post(gateway: Gateway, **word: Any) -> Any:
    return gateway.http.post("/review", json=word)


# --- over HTTP ----------------------------------------------------------------------------------------------


def test_the_page_runs_its_own_script_only(gateway):
    fill(gateway.root)
    first, second = gateway.get("/review"), gateway.get("/review")
    policy = first.headers["content-security-policy"]
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy).group(1)
    assert (
        first.status_code == 200
        and policy.startswith("default-src 'none'")
        and "unsafe" not in policy
        and "frame-ancestors 'none'" in policy
    )
    assert (
        first.text.count(f'nonce="{nonce}"') == first.text.count("<script") + first.text.count("<style") == 2
    )
    assert nonce not in second.text
    assert re.findall(r"<[^>]+ (?:on\w+|style)=", first.text) == []
    assert SCRIPT not in first.text


def test_a_word_is_kept_and_the_next_row_comes(gateway):
    rows = fill(gateway.root)
    shown = post(gateway, action="next").json()
    assert (shown["waiting"], shown["item"]["id"]) == (5, rows[0].id)
    after = post(gateway, action="accept", item=rows[0].id, of=rows[0].draft, by="Ana", why="so it is").json()
    assert (after["waiting"], after["item"]["id"], after["kept"]) == (4, rows[1].id, True)
    kept = decisions(gateway.root)[rows[0].id]
    assert (kept.verdict, kept.by, kept.why) == ("accept", "Ana", "so it is")


def test_only_the_draft_that_the_address_names_is_shown(gateway):
    fill(gateway.root)
    queue = ReviewQueue(gateway.root)
    queue.add(items("other"), share=1)
    queue.close()
    assert post(gateway, action="next", draft="other").json()["item"]["draft"] == "other"
    assert post(gateway, action="next").json()["waiting"] == 10


def test_what_somebody_else_decided_in_the_meantime_stays(gateway):
    rows = fill(gateway.root)
    word = {"item": rows[0].id, "of": rows[0].draft}
    post(gateway, action="reject", by="Ana", **word)
    late = post(gateway, action="accept", by="Ben", **word).json()
    assert (
        not late["kept"]
        and late["note"].startswith("Ana decided this row in the meantime (reject)")
        and late["item"]["id"] == rows[1].id
    )
    undone = post(gateway, action="undo", by="Ben", **word).json()
    assert undone["note"] == "Ana decided that row later; it stays so"
    assert decisions(gateway.root)[rows[0].id].verdict == "reject"
    assert post(gateway, action="undo", by="Ana", **word).json()["item"]["id"] == rows[0].id
    assert decisions(gateway.root)[rows[0].id] is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ({"action": "accept", "by": ""}, "nobody is named"),
        ({"action": "edit", "by": "Ana", "answer": " "}, "no valid conversation"),
        ({"action": "accept", "by": "Ana", "item": "0" * 32}, "holds no row"),
        ({"action": "burn", "by": "Ana"}, "the body is no word on a row"),
        ({"action": "next", "more": 1}, "the body is no word on a row"),
    ],
)
def test_a_word_that_cannot_stand_is_told_and_changes_nothing(gateway, word, message):
    rows = fill(gateway.root)
    refused = post(gateway, **({"item": rows[0].id, "of": rows[0].draft} | word))
    assert refused.status_code == 400 and message in refused.json()["error"]["message"]
    assert set(decisions(gateway.root).values()) == {None}


def test_half_a_surrogate_pair_can_be_shown(gateway):
    queue = ReviewQueue(gateway.root)
    queue.add(
        [Item("a" * 32, "q", "quarantine", (Message("user", "\ud800?"),), doubts=("invalid_unicode",))],
        share=0,
    )
    queue.close()
    shown = post(gateway, action="next")
    assert json.loads(shown.text)["item"]["turns"] == [{"role": "user", "content": "\ud800?"}]


def test_a_file_that_cannot_be_read_is_503(gateway):
    (gateway.root / ".ratchet/review.db").write_text("no database" * 100)
    refused = post(gateway, action="next")
    assert refused.status_code == 503 and "review.db cannot be used" in refused.json()["error"]["message"]


def test_other_sites_and_other_keys_stay_out(gateway):
    rows = fill(gateway.root)
    word = {"action": "accept", "item": rows[0].id, "of": rows[0].draft, "by": "Ana"}
    assert (
        gateway.http.post(
            "/review", content=json.dumps(word), headers={"content-type": "text/plain"}
        ).status_code
        == 415
    )
    assert gateway.http.post("/review", json=word, headers={"host": "evil.example"}).status_code == 403
    assert gateway.get("/review", headers={"host": "evil.example"}).status_code == 403

    infer, admin = (
        add_key(gateway.root, "website", ["infer", "feedback"]),
        add_key(gateway.root, "ana", ["admin"]),
    )
    for refused in (gateway.get("/review"), post(gateway, **word)):
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == 'Basic realm="ratchet"'
    assert gateway.get("/review", headers={"authorization": f"Bearer {infer}"}).status_code == 403
    assert (
        gateway.http.post("/review", json=word, headers={"authorization": f"Bearer {infer}"}).status_code
        == 403
    )
    assert set(decisions(gateway.root).values()) == {None}
    assert gateway.get("/review", auth=("ana", admin)).status_code == 200
    assert gateway.http.post("/review", json=word, auth=("ana", admin)).json()["kept"]


def test_two_people_at_once_lose_no_word(gateway):
    rows = fill(gateway.root)
    with ThreadPoolExecutor(8) as people:
        words = [
            {"action": "accept", "item": row.id, "of": row.draft, "by": by}
            for row in rows
            for by in ("Ana", "Ben")
        ]
        answers = list(people.map(lambda word: gateway.http.post("/review", json=word), words))
    assert {answer.status_code for answer in answers} == {200}
    assert {word.verdict for word in decisions(gateway.root).values()} == {"accept"}


# --- in a browser -------------------------------------------------------------------------------------------


class Visit:
    """A browser of one's own on the page, its name given."""

    def __init__(
        self,
        browser: Any,
        gateway: Gateway,
        *,
        size: str = "desk",
        scheme: str = "light",
        path: str = "/review",
        by: str = "Ana",
    ) -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(gateway.url + path, wait_until="networkidle")
        if by:
            self.page.keyboard.type(by)
            self.page.keyboard.press("Enter")
            self.wait("")

    def wait(self, words: str) -> None:
        self.page.wait_for_function(
            "words => document.getElementById('waiting').textContent.includes(words || 'wait') && !busy",
            arg=words,
            timeout=scaled(5000),
        )

    def press(self, key: str, words: str) -> None:
        self.page.keyboard.press(key)
        self.wait(words)

    def text(self, id: str) -> str:
        return self.page.locator(f"#{id}").text_content()


@pytest.fixture
def visit(browser: Any, gateway: Gateway) -> Iterator[Any]:
    opened: list[Visit] = []

    def open_page(**how: Any) -> Visit:
        opened.append(Visit(browser, gateway, **how))
        return opened[-1]

    yield open_page
    for one in opened:
        one.context.close()


@pytest.mark.browser
def test_a_key_a_word(gateway, visit):
    rows = fill(gateway.root)
    seen = visit()
    assert seen.text("question") == rows[0].messages[0].content and "not in the passage" in seen.text(
        "doubts"
    )
    seen.press("a", "4 rows wait")
    seen.press("r", "3 rows wait")
    seen.page.keyboard.press("e")
    assert seen.page.locator("#edit").input_value() == rows[2].messages[1].content
    seen.page.locator("#edit").fill("By reading a rare word.")  # a, r and e are letters there
    seen.page.keyboard.type(" are")
    seen.press("Control+Enter", "2 rows wait")
    kept = decisions(gateway.root)
    assert [(kept[row.id].verdict, kept[row.id].by) for row in rows[:3]] == [
        ("accept", "Ana"),
        ("reject", "Ana"),
        ("edit", "Ana"),
    ]
    assert kept[rows[2].id].messages[1].content == "By reading a rare word. are"

    seen.press("u", "3 rows wait")
    assert seen.text("question") == rows[2].messages[0].content
    seen.press("u", "4 rows wait")
    assert seen.text("question") == rows[1].messages[0].content
    assert [decisions(gateway.root)[row.id] is None for row in rows[:3]] == [False, True, True]
    for left in (3, 2, 1):
        seen.press("a", f"{left} row")
    seen.press("a", "0 rows wait")
    assert "Nothing waits for a word." in seen.text("done") and "5 rows: 5 accepted" in seen.text("drafts")
    assert seen.said == [] and {url for url in seen.requests if url != "data:,"} == {f"{gateway.url}/review"}


@pytest.mark.browser
def test_a_row_shows_its_pictures_where_they_stand_in_the_text(gateway, visit):
    drawn = picture(3, 80, 60)
    write_shard(gateway.root / "data/raw", {name_of(drawn): drawn})
    media = (name_of(drawn), "0" * 64 + ".png")
    asked = Message("user", f"Here {MEDIA_MARK} and there {MEDIA_MARK}?", media=media)
    messages = (asked, Message("assistant", "Red."))
    queue = ReviewQueue(gateway.root)
    queue.add([Item(example_id(messages), "q", "quarantine", messages, doubts=("boilerplate",))], share=0)
    queue.close()
    seen = visit()
    shown = seen.page.locator("#question img")
    assert shown.count() == 1 and shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [
        80,
        60,
    ]
    assert seen.text("question") == "Here  and there [the picture or recording is not here: dvc pull]?"
    assert seen.said == []
    if folder := os.environ.get("RATCHET_SHOTS"):
        seen.page.screenshot(path=f"{folder}/review-picture.png")


@pytest.mark.browser
def test_a_row_shows_the_earlier_answer_that_it_contradicts(gateway, visit):
    messages = (Message("user", "Which colour has jade?"), Message("assistant", "Blue."))
    plain = (Message("user", "And amber?"), Message("assistant", "Yellow."))
    rows = [
        Item(example_id(messages), "q", "quarantine", messages, doubts=("contradiction",), earlier="Green."),
        Item(example_id(plain), "q", "quarantine", plain, doubts=("boilerplate",)),
    ]
    queue = ReviewQueue(gateway.root)
    queue.add(rows, share=0)
    queue.close()
    seen = visit()
    assert (seen.text("answer"), seen.text("earlier")) == ("Blue.", "Green.")
    assert seen.page.locator("#contradicted").is_visible()
    if folder := os.environ.get("RATCHET_SHOTS"):
        seen.page.screenshot(path=f"{folder}/review-contradiction.png")
    seen.press("a", "1 row waits")
    assert seen.text("answer") == "Yellow." and not seen.page.locator("#contradicted").is_visible()
    assert seen.said == []


@pytest.mark.browser
def test_a_row_plays_its_recording(gateway, visit):
    played = sound(3, 0.5)
    write_shard(gateway.root / "data/raw", {name_of(played): played}, "sounds")
    asked = Message("user", f"Hear {MEDIA_MARK}?", media=(name_of(played),))
    messages = (asked, Message("assistant", "High."))
    queue = ReviewQueue(gateway.root)
    queue.add([Item(example_id(messages), "q", "quarantine", messages, doubts=("boilerplate",))], share=0)
    queue.close()
    seen = visit()
    shown = seen.page.locator("#question audio")
    assert shown.count() == 1 and shown.evaluate("sound => sound.controls")
    assert shown.get_attribute("src").startswith("data:audio/flac;base64,")
    seen.page.wait_for_function("document.querySelector('#question audio').readyState > 0")
    assert shown.evaluate("sound => sound.duration") == pytest.approx(0.5, abs=0.01)
    assert seen.said == []
    if folder := os.environ.get("RATCHET_SHOTS"):
        seen.page.screenshot(path=f"{folder}/review-recording.png")


@pytest.mark.browser
def test_words_of_rows_stay_text(gateway, visit):
    rows = fill(gateway.root)
    seen = visit()
    seen.press("a", "4 rows wait")
    assert (
        seen.text("question") == rows[1].messages[0].content
        and SCRIPT in seen.text("doubts")
        and SCRIPT in seen.text("passage")
    )
    assert seen.page.locator("script").count() == 1 and seen.page.locator("img").count() == 0
    assert seen.page.title() == "pydoc: review" and seen.said == []


@pytest.mark.browser
def test_the_name_is_asked_once_and_undo_outlives_a_reload(gateway, visit):
    rows = fill(gateway.root)
    seen = visit(by="")
    assert seen.page.locator("#name").is_visible() and not seen.page.locator("#row").is_visible()
    seen.page.keyboard.type("Ana Ré")
    seen.page.keyboard.press("Enter")
    seen.wait("5 rows wait")
    seen.press("a", "4 rows wait")
    seen.page.reload(wait_until="networkidle")
    seen.wait("4 rows wait")
    assert not seen.page.locator("#name").is_visible() and decisions(gateway.root)[rows[0].id].by == "Ana Ré"
    seen.press("u", "5 rows wait")


@pytest.mark.browser
def test_what_goes_wrong_is_told_on_the_page(gateway, visit):
    rows = fill(gateway.root)
    seen = visit()
    seen.page.keyboard.press("e")
    seen.page.locator("#edit").fill(" ")
    seen.page.keyboard.press("Control+Enter")
    seen.page.get_by_text("no valid conversation").wait_for()
    assert seen.page.locator("#editing").is_visible()
    seen.page.keyboard.press("Escape")
    assert seen.page.locator("#answer").is_visible() and seen.text("answer") == rows[0].messages[1].content
    seen.context.set_offline(True)
    seen.page.keyboard.press("a")
    seen.page.get_by_text("the gateway does not answer").wait_for()
    seen.context.set_offline(False)
    seen.press("a", "4 rows wait")
    assert not seen.page.locator("#fault").is_visible()


@pytest.mark.browser
def test_a_key_with_another_or_in_a_text_field_is_no_word(gateway, visit):
    fill(gateway.root)
    seen = visit()
    for key in ("Control+a", "Alt+r", "Shift+Tab"):
        seen.page.keyboard.press(key)
    seen.page.locator("#why").fill("")
    seen.page.keyboard.type("are u")
    assert seen.page.locator("#why").input_value() == "are u"
    assert set(decisions(gateway.root).values()) == {None}
    seen.page.keyboard.press("Escape")
    seen.press("r", "4 rows wait")
    assert {word.why for word in decisions(gateway.root).values() if word} == {"are u"}


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_it_never_scrolls_sideways(gateway, visit, size, scheme, tmp_path):
    fill(gateway.root)
    seen = visit(size=size, scheme=scheme)
    folder = Path(os.environ.get("RATCHET_SHOTS") or tmp_path)  # to look at
    seen.page.screenshot(path=folder / f"review-{size}-{scheme}.png")
    for left in ("4", "3", "2", "1"):
        seen.page.keyboard.press("e")
        check_width(seen, size)
        seen.page.keyboard.press("Escape")
        check_width(seen, size)
        seen.press("a", f"{left} row")
    check_width(seen, size)
    dark = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(19, 22, 26)") == (scheme == "dark")
    assert (folder / f"review-{size}-{scheme}.png").stat().st_size > 10_000


def check_width(seen: Visit, size: str) -> None:
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    assert (
        seen.page.evaluate(
            "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right >"
            " innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"
        )
        == []
    )


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(gateway, visit, scheme):
    fill(gateway.root)
    seen = visit(scheme=scheme)
    found = seen.page.evaluate(CONTRAST.replace("'main *'", "'body *:not(script):not(style)'"))
    assert len(found) > 12
    assert [
        text for text in found if text["ratio"] < text["wanted"] and text["text"] not in ("Undo", "u")
    ] == []  # a switched-off button
