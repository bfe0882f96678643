"""The page: what it says of a checkout, and that nothing on it can be turned against who reads it."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import pytest
from busy import CONFIG, HOSTILE, REPORT, check, make_busy
from PIL import Image
from places import make_repository, use_git_without_a_user, use_no_mlflow, write_files

from ratchet.config.params import Config
from ratchet.federation.link.flower import FOLDER
from ratchet.federation.records import NODE, OWN_SCORES, SETTINGS, TOOK_PART, Done, Node, OwnScores
from ratchet.files import read_json, write_json
from ratchet.monitoring.request_log import URL_VARIABLE
from ratchet.monitoring.verdicts import VERDICTS, seconds_of
from ratchet.promotion.rollout import FILE as ROLLOUT
from ratchet.promotion.rollout import read_rollout, write_rollout
from ratchet.reporting.charts import intervals, lines, make_slots, nice_top, p_height, stack
from ratchet.reporting.dashboard import Part, gather, read_linked, render_page, write_page
from ratchet.reporting.retention import OLD_SAVED, SAVED


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    use_git_without_a_user(monkeypatch)
    use_no_mlflow(monkeypatch)
    monkeypatch.delenv(URL_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def _busy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        use_git_without_a_user(patch)
        return make_busy(tmp_path_factory.mktemp("page") / "checkout")


@pytest.fixture
def busy(_busy: Path, tmp_path: Path) -> Path:
    return shutil.copytree(_busy, tmp_path / "checkout")


class Reader(HTMLParser):
    """Tags with their attributes, and the text between them by words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())


# --- what it says -------------------------------------------------------------------------------------------


def test_it_says_who_is_in_charge_and_what_is_rolled_out(busy: Path) -> None:
    words = Reader(render_page(busy, CONFIG)).words

    for wanted in (
        "v3 is in charge",
        "Rollout of v4",
        "25 % of the users get v4, the others v3.",
        "+0.118 [−0.012, +0.248]",
        "5 %: 180 + 11",
        "rolled back",
        "no evidence",
    ):
        assert wanted in words


def test_measures_are_judged_by_their_margins(busy: Path) -> None:
    """Latency is compared as a logarithm: 0.25 is 28 %, beyond the margin of 25 %."""
    words = Reader(render_page(busy, CONFIG)).words

    assert "failed requests +0.1 % [−0.6, +0.8] no worse" in words
    assert "latency +35.0 % [+28.4, +49.2] worse" in words


def test_it_shows_traffic_and_feedback_by_version(busy: Path) -> None:
    found = gather(busy, CONFIG)
    words = Reader(render_page(busy, CONFIG)).words

    assert sum(row.requests for row in found.traffic.found) == 13 * 72
    assert "v4 18 0.0 %" in words and "v1 287" in words


def test_it_names_the_drift_and_why_nothing_is_retrained(busy: Path) -> None:
    words = Reader(render_page(busy, CONFIG)).words

    for wanted in (
        "500 requests to v3",
        "p = 0.0004",
        "numpy, array",
        "18.0 % of the requests, 0.4 % of the reference",
        "Retraining: no",
        "120 new rows, wanted 200",
        "1 of 57 verdicts",
    ):
        assert wanted in words
    assert "unseen words 0.0004 0.21 0.06" in words and "the champion has no answers on record" in words


def test_it_shows_small_copies_of_the_pictures_that_are_kept_and_tells_the_others_in_words(
    busy: Path,
) -> None:
    page = Reader(render_page(busy, CONFIG))
    shown = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(shown) == 2
    for source in shown:
        head, data = source.split(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as small:
            assert small.size == (160, 107)
    assert "not kept: 1x1 pixels, dark" in page.words and "640x480 pixels, dark, grey" in page.words
    shutil.rmtree(busy / ".ratchet/pictures")
    assert "240x160 pixels, bright, colourful" in Reader(render_page(busy, CONFIG)).words


def test_it_shows_the_ledger_and_what_each_promotion_kept(busy: Path) -> None:
    found = gather(busy, CONFIG)
    words = Reader(render_page(busy, CONFIG)).words

    assert [(row.from_, row.to, row.move) for row in found.ledger.found][:2] == [
        (2, 3, "promote"),
        (3, 2, "rollback"),
    ]
    assert [entry.version for entry in found.forgetting.found] == [3, 2, 1]
    assert "batch one.jsonl −0.030 [−0.090, +0.030] unclear" in words and "nothing to forget yet" in words


def test_a_rollback_does_not_change_what_a_promotion_kept(busy: Path) -> None:
    entry = gather(busy, CONFIG).forgetting.found[1]

    assert (
        entry.version == 2
        and entry.rival == 1
        and [check.name for check in entry.checks] == ["golden", "past"]
    )


def test_it_is_written_whole_where_it_is_wanted(busy: Path, tmp_path: Path) -> None:
    path = write_page(busy, CONFIG, tmp_path / "new" / "report.html")

    assert path == tmp_path / "new" / "report.html" and path.read_text(encoding="utf-8").rstrip().endswith(
        "</html>"
    )


def links(page: str) -> list[str]:
    return [attributes["href"] or "" for tag, attributes in Reader(page).tags if tag == "a"]


EVALUATION = "evaluations/aaaaaaaaaaaa-against-v2.html"


@pytest.mark.parametrize("place", [".ratchet/report.html", "../elsewhere/a b/report.html", "report.html"])
def test_the_page_links_what_lies_in_the_checkout_wherever_it_is_written(busy: Path, place: str) -> None:
    path = write_page(busy, CONFIG, busy / place)
    found = {(path.parent / unquote(link)).resolve() for link in links(path.read_text(encoding="utf-8"))}

    assert found == {
        (busy / ".ratchet" / EVALUATION).resolve(),
        (busy / REPORT / "report.html").resolve(),
    }
    assert all(target.is_file() for target in found)


def test_what_this_checkout_does_not_have_is_not_linked(busy: Path) -> None:
    shutil.rmtree(busy / ".ratchet/evaluations")
    shutil.rmtree(busy / ".ratchet/monitor/reports")

    assert links(render_page(busy, CONFIG)) == []


def test_why_the_champion_was_promoted_is_said_first_and_of_each_promotion(busy: Path) -> None:
    words = Reader(render_page(busy, CONFIG)).words

    told = "Promoted: every check passed. Its evaluation"
    assert words.index("v3 is in charge") < words.index(told) < words.index("since")
    assert words.count("Promoted: every check passed.") == 4, "of the champion, then of each of three"
    assert "The newest candidate." not in words, "it is the champion"


def test_the_newest_candidate_is_told_where_it_is_not_the_champion(busy: Path) -> None:
    gate = read_json(busy / "reports/gate.json") | {
        "verdict": "reject",
        "rival": {"model": "champion", "version": 3},
        "checks": [check("golden", -0.06, -0.08, -0.04, -0.02, "fail")],
    }
    write_json(busy / "reports/gate.json", gate)

    told = "Kept the champion (v3): the candidate lost 6 points on the golden questions."
    assert f"The newest candidate. {told}" in Reader(render_page(busy, CONFIG)).words


@pytest.mark.parametrize(
    "asked",
    [
        "/keys.json",
        "/evaluations/../keys.json",
        "/evaluations/../keys.html",
        "/monitor/reports/../report.html",
        "/monitor/reports/none/report.html",
        "/evaluations/none.html",
    ],
)
def test_nothing_but_linked_pages_is_served(busy: Path, asked: str) -> None:
    write_files(busy, {".ratchet/keys.json": "secret", ".ratchet/keys.html": "secret"})
    write_files(busy, {".ratchet/monitor/report.html": "secret"})

    assert read_linked(busy, asked) is None
    assert "what it saw" in (read_linked(busy, "/monitor/reports/20260101T000000Z/report.html") or "")


def test_it_shows_a_federation_where_there_is_one(busy: Path) -> None:
    assert "Training together" not in Reader(render_page(busy, CONFIG)).words
    part = {"name": "north", "rows": 62, "steps": 4, "seconds": 1.0, "train_loss": 2.5, "epsilon": 3.2}
    record = {
        "number": 1,
        "factors": "both",
        "nodes": [part | {"validation_loss": 2.25}],
        "left_out": {HOSTILE: "it did not answer"},
        "rows": 1062,
        "seconds": 31.4,
        "sent_bytes": 2**20,
        "received_bytes": 2**19,
        "moved": 1.0,
    }
    write_json(busy / "reports/train/rounds.json", [record])
    write_json(busy / FOLDER / "nodes.json", {"1": "north", "2": "south"})
    page = render_page(busy, CONFIG)
    words = Reader(page).words
    for wanted in (
        "Training together the link does not run",
        "north away south away",
        "1 north ε = 3.2",
        "without",
        "it did not answer 1,062 2.5000 2.2500 31 1.5",
    ):
        assert wanted in words
    assert HOSTILE not in page


def test_a_node_sees_its_own_rounds(busy: Path) -> None:
    done = Done("2026-03-01T10:00:00+00:00", "run", 2, 62, 4, 1.5, 2.5, None, 3.2)
    write_json(busy / NODE / SETTINGS, msgspec.to_builtins(Node("north", "here.example:8092")))
    (busy / NODE / TOOK_PART).write_bytes(msgspec.json.encode(done) + b"\n")
    own = OwnScores("run", "exact_match", "champion", 92, 0.31, 0.42)
    write_json(busy / NODE / OWN_SCORES, msgspec.to_builtins(own))
    words = Reader(render_page(busy, CONFIG)).words
    assert "exact_match 0.310 → 0.420 from the champion to the candidate of run run" in words
    assert "This checkout is the node north , of the coordinator at here.example:8092." in words
    assert "2026-03-01T10:00:00+00:00 2 62 2.5000 – 3.2" in words


# --- hostile words ------------------------------------------------------------------------------------------


def test_nothing_of_a_user_becomes_a_tag(busy: Path) -> None:
    page = render_page(busy, CONFIG)
    tags = Reader(page).tags

    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in tags}
    assert {str(of["src"])[:22] for tag, of in tags if tag == "img"} == {"data:image/jpeg;base64"}
    assert page.count("&lt;script&gt;") >= 4 and HOSTILE not in page
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]


def test_nothing_is_fetched_from_anywhere(busy: Path) -> None:
    page = render_page(busy, CONFIG)
    targets = [
        value
        for _, attributes in Reader(page).tags
        for name, value in attributes.items()
        if name in ("src", "href", "action", "data", "srcset")
    ]

    fetched = [target for target in targets if target not in links(page)]
    assert fetched[0] == "data:," and len(fetched) == 3
    assert all(str(target).startswith("data:image/jpeg;base64,") for target in fetched[1:])
    assert "@import" not in page and "url(" not in page and "default-src 'none'" in page


def test_halves_of_characters_do_not_stop_the_page(busy: Path) -> None:
    path = busy / VERDICTS
    path.write_text(
        path.read_text(encoding="utf-8").replace("a contiguous array?", "\\ud800 half"), encoding="utf-8"
    )

    assert "? half" in render_page(busy, CONFIG)


# --- where something is missing -----------------------------------------------------------------------------


def test_an_empty_checkout_says_which_command_fills_each_part(tmp_path: Path) -> None:
    words = Reader(render_page(make_repository(tmp_path / "checkout"), Config())).words

    assert "Nobody is in charge yet" in words
    for command in (
        "ratchet retrain",
        "ratchet serve",
        "POST /v1/feedback",
        "ratchet monitor",
        "ratchet promote",
    ):
        assert command in words


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "the first version that passes the gate takes charge; later ones start a rollout"),
        ({"promotion": "auto"}, "takes charge at once, without a rollout"),
        ({"promotion": "manual"}, "waits for a person"),
    ],
)
def test_it_says_what_happens_to_a_candidate_by_the_setting(
    tmp_path: Path, settings: dict[str, Any], wanted: str
) -> None:
    words = Reader(render_page(tmp_path, Config.model_validate(settings))).words.lower()
    assert words.count(wanted) == 2, "under the champion and under the rollout"
    assert ("rollout of" in words or "start a rollout" in words) == (not settings)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "A candidate that passes the gate starts one."),
        ({"rollout": {"steps": [1.0]}}, "takes charge at once (the first of rollout.steps is 1)"),
        ({"promotion": "auto"}, "takes charge at once, without a rollout"),
        ({"promotion": "manual"}, "waits for a person"),
    ],
)
def test_with_a_champion_only_the_setting_rollout_starts_a_rollout(
    busy: Path, settings: dict[str, Any], wanted: str
) -> None:
    (busy / ROLLOUT).unlink()
    values = {**CONFIG.model_dump(), **settings}
    assert wanted in Reader(render_page(busy, Config.model_validate(values))).words


def test_a_folder_without_git_gets_a_page_too(tmp_path: Path) -> None:
    assert "Nobody is in charge yet" in render_page(tmp_path, Config())


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("champion.json", "champion"),
        (str(ROLLOUT), "rollout"),
        (".ratchet/rollouts.jsonl", "past"),
        (".ratchet/requests.db", "traffic"),
    ],
)
@pytest.mark.parametrize("garbage", ["{", '{"version": "x"}', "[]"])
def test_a_part_that_cannot_be_read_says_so_and_the_others_stay(
    busy: Path, file: str, part: str, garbage: str
) -> None:
    for path in busy.glob(".ratchet/requests.db-*"):
        path.unlink()
    write_files(busy, {file: garbage * 50})
    found = gather(busy, CONFIG)

    assert [name for name, value in found._asdict().items() if isinstance(value, Part) and value.fault] == [
        part
    ]
    assert "Cannot be read." in render_page(busy, CONFIG)


@pytest.mark.parametrize(
    "line",
    [
        "null",
        "[]",
        "3",
        '{"at": null}',
        '{"at": "soon"}',
        '{"at": 1e300, "verdict": "drift"}',
        '{"at": 5, "decision": [], "topics": [3], "columns": {"a": 1}}',
    ],
)
def test_a_verdict_of_another_shape_is_left_out(busy: Path, line: str) -> None:
    with (busy / VERDICTS).open("a", encoding="utf-8") as out:
        out.write(f"\n{line}\n")

    assert "120 new rows" in render_page(busy, CONFIG)


def test_a_verdict_without_its_details_is_shown(tmp_path: Path) -> None:
    write_files(tmp_path, {str(VERDICTS): '{"at": 1790000000, "verdict": "too few", "p": NaN}\n'})

    assert "too few" in Reader(render_page(tmp_path, Config())).words


def test_a_rollout_that_nobody_has_looked_at_is_shown(busy: Path) -> None:
    found = read_rollout(busy)
    assert found
    write_rollout(
        busy,
        type(found)(
            **{name: getattr(found, name) for name in found.__struct_fields__}
            | {"last": {}, "state": "paused"}
        ),
    )
    words = Reader(render_page(busy, CONFIG)).words

    assert "ratchet rollout look" in words and "0 % of the users get v4" in words


def test_what_the_gateway_refuses_is_shown(busy: Path) -> None:
    write_files(busy, {".ratchet/serving/state.json": '{"refused": {"v4": "rank 64 is not the base\'s"}}'})

    assert "The gateway refuses v4. rank 64" in Reader(render_page(busy, CONFIG)).words


# --- charts -------------------------------------------------------------------------------------------------


def test_slots_hold_all_of_the_time_in_few_enough_bars() -> None:
    for hours in (0, 1, 30, 100, 14 * 24, 10_000):
        slots = make_slots(1_790_000_000 - hours * 3600, 1_790_000_000)
        assert (
            slots.start <= 1_790_000_000 - hours * 3600
            and slots.start + slots.number * slots.width > 1_790_000_000
        )
        assert 24 <= slots.number <= 62


def test_stacked_bars_are_as_high_as_their_sum() -> None:
    bars = stack({(3, 1): 10.0, (3, 2): 30.0}, make_slots(0, 0), [1, 2], 100.0, "requests")

    assert [(bar.series, bar.y, bar.height) for bar in bars] == [(1, 90.0, 10.0), (2, 60.0, 30.0)]


def test_a_line_breaks_where_a_version_was_away() -> None:
    slots = make_slots(0, 0)

    assert [
        len(line.points) for line in lines({(0, 1): 0.5, (1, 1): 0.6, (20, 1): 0.7, (2, 2): 1.0}, slots)
    ] == [2, 1, 1]


def test_axes_end_at_round_numbers() -> None:
    assert [nice_top(value) for value in (0, 0.35, 1, 3, 41, 100, 101, 4_001)] == [
        1,
        0.4,
        1,
        3,
        50,
        100,
        200,
        5_000,
    ]
    assert [p_height(p) for p in (1.0, 0.01, 0.0)] == [100.0, 50.0, 0.0]


def test_bounds_without_an_end_stay_inside() -> None:
    (drawn,) = intervals([(-float("inf"), 0.1, float("inf"), None)])

    assert drawn.low == 0 and drawn.high == 100 and 50 < drawn.mean < 100


def test_times_without_a_zone_are_utc() -> None:
    assert (
        seconds_of("2026-01-02T03:04:05")
        == seconds_of("2026-01-02T03:04:05Z")
        == seconds_of(1767323045)
        == 1767323045.0
    )
    assert re.search(r'<time datetime="[\d-]+T[\d:]+Z">', render_page(Path("nowhere"), Config().model_copy()))


def test_the_retention_table_is_shown_as_it_was_read_last_and_says_what_was_not_asked(busy: Path) -> None:
    words = Reader(render_page(busy, CONFIG)).words
    assert "0.350 0.300 to 0.400" in words
    assert words.count("not asked") == 1
    (busy / SAVED).rename(busy / OLD_SAVED)
    assert "0.350 0.300 to 0.400" in Reader(render_page(busy, CONFIG)).words
    (busy / OLD_SAVED).unlink()
    (busy / SAVED).write_text("{", encoding="utf-8")
    assert "v3 is in charge" in Reader(render_page(busy, CONFIG)).words
    (busy / SAVED).unlink()
    assert "Nothing was read yet: ratchet retention" in Reader(render_page(busy, CONFIG)).words
