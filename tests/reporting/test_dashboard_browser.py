"""The pages in a real headless Chromium: nothing fetched, nothing in the console, readable on a phone and in
both schemes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from busy import CONFIG, REPORT, make_busy
from contrast import CONTRAST
from evaluation_reports import RETENTION, make_reports
from patience import scaled
from places import make_repository, use_git_without_a_user
from served import running_gateway

from ratchet.gateway.auth import add_key
from ratchet.reporting.dashboard import write_page
from ratchet.reporting.evaluation_page import gather, write_evaluation_page

pytestmark = pytest.mark.browser
SCHEMES = ["light", "dark"]
SIZES = {"phone": (390, 844), "desk": (1280, 900)}
# Like `CONTRAST`, for what charts are made of: 1.4.11 wants 3 : 1.
MARKS = """() => [...document.querySelectorAll(
  'rect, .line, .dot, .interval .range, .interval .mean, .threshold'
)].map(mark => {
  const style = getComputedStyle(mark), card = getComputedStyle(mark.closest('.card')).backgroundColor;
  return [mark.tagName === 'rect' ? style.fill : style.stroke, card];
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`busy`, `empty` and the page of one `evaluation`, written once."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        use_git_without_a_user(patch)
        made = {"busy": make_busy(folder / "busy"), "empty": make_repository(folder / "empty")}
        found = gather(make_reports(folder / "judged"), "v3", RETENTION)
        evaluation = write_evaluation_page(folder / "evaluation.html", found)
        return {
            "evaluation": evaluation,
            **{name: write_page(root, CONFIG, folder / f"{name}.html") for name, root in made.items()},
        }


class Seen:
    """A page that is open, and what it asked for and said."""

    def __init__(self, browser: Any, path: Path, size: str, scheme: str) -> None:
        width, height = SIZES[size]
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.requests: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(path.as_uri(), wait_until="networkidle")


@pytest.fixture
def look(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    opened: list[Seen] = []

    def open_page(name: str, size: str = "desk", scheme: str = "light") -> Seen:
        opened.append(Seen(browser, pages[name], size, scheme))
        return opened[-1]

    yield open_page
    for seen in opened:
        seen.page.close()


@pytest.mark.parametrize("name", ["busy", "empty", "evaluation"])
def test_nothing_is_fetched_and_nothing_is_complained_about(
    look: Any, pages: dict[str, Path], name: str
) -> None:
    seen = look(name)

    assert [url for url in seen.requests if url != "data:,"] == [pages[name].as_uri()]
    assert seen.said == []


EVALUATION = "evaluations/aaaaaaaaaaaa-against-v2.html"
THUMBNAIL = "data:image/jpeg;base64,"  # how the page shows a kept picture


def test_words_of_users_do_nothing(look: Any) -> None:
    page = look("busy").page

    assert page.title() == "pydoc-helper: v3 is in charge"
    assert (
        page.locator(f"script, img:not([src^='{THUMBNAIL}'])").count() == 0
        and page.get_by_text("<script>").count() >= 4
    )


@pytest.mark.parametrize("size", list(SIZES))
def test_the_version_in_charge_is_the_first_thing_seen(look: Any, size: str) -> None:
    heading = look("busy", size).page.get_by_role("heading", name="v3 is in charge")

    assert heading.is_visible() and heading.bounding_box()["y"] < 300


@pytest.mark.parametrize("name", ["busy", "empty", "evaluation"])
@pytest.mark.parametrize("size", list(SIZES))
def test_it_never_scrolls_sideways(look: Any, name: str, size: str) -> None:
    page = look(name, size).page
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    width = page.evaluate("document.documentElement.scrollWidth")
    outside = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"
    )

    assert width <= SIZES[size][0] and outside == []


@pytest.mark.parametrize("name", ["busy", "empty", "evaluation"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_text_can_be_read_in_both_schemes(look: Any, name: str, scheme: str) -> None:
    page = look(name, scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    found = page.evaluate(CONTRAST)

    assert len(found) > (20 if name == "empty" else 100)
    assert [text for text in found if text["ratio"] < text["wanted"]] == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_marks_stand_out_in_both_schemes(look: Any, scheme: str) -> None:
    pairs = {tuple(pair) for pair in look("busy", scheme=scheme).page.evaluate(MARKS)}

    assert len(pairs) >= 6
    assert {pair: round(contrast(*pair), 2) for pair in pairs if contrast(*pair) < 3} == {}


def test_an_evaluation_begins_with_one_sentence(look: Any) -> None:
    page = look("evaluation", "phone").page

    sentence = page.get_by_role("heading", level=1).inner_text()
    assert sentence.startswith("Kept the champion (v1): the candidate lost 20 points on what batch ")
    assert page.get_by_role("heading", level=1).bounding_box()["y"] < 300
    assert page.get_by_role("heading", level=2).all_inner_texts() == [
        "Every check",
        "Figures",
        "Slices",
        "Retention",
        "Rows that got better",
        "Rows that got worse",
        "Training",
    ]


def test_rows_that_moved_stand_side_by_side_and_their_words_do_nothing(look: Any) -> None:
    page = look("evaluation").page

    better, worse = page.locator(".pairs").all()
    assert (better.locator("tbody tr").count(), worse.locator("tbody tr").count()) == (20, 20)
    assert [better.locator("th").nth(place).inner_text() for place in (1, 2)] == ["v1", "v3"]
    assert page.title() == "v3: reject" and page.locator("script, img").count() == 0
    assert page.get_by_text("<script>").count() >= 20


def test_its_links_open_the_evaluation_and_evidentlys_report_from_the_file(look: Any) -> None:
    seen = look("busy")

    seen.page.get_by_role("link", name="Its evaluation").first.click()
    assert seen.page.title() == "v3: reject" and seen.page.get_by_text("Every check").is_visible()
    seen.page.go_back()
    seen.page.get_by_role("link", name="Evidently's report").click()
    assert seen.page.title() == "Evidently" and seen.page.get_by_text("what it saw").is_visible()
    assert seen.said == []


def test_its_links_open_where_the_gateway_serves_it_and_evidentlys_scripts_reach_nothing(
    browser: Any, tmp_path: Path
) -> None:
    root = make_busy(tmp_path / "busy")
    write_evidently(root / REPORT / "report.html")
    with running_gateway(root, version=None) as gateway:
        key = add_key(root, "Ana", ["admin"])
        for path in ("/", f"/{EVALUATION}", "/monitor/reports/20260101T000000Z/report.html"):
            refused = gateway.get(path)
            assert refused.status_code == 401 and "Basic" in refused.headers["www-authenticate"]
        assert gateway.get("/evaluations/none.html", auth=("", key)).status_code == 404
        context = browser.new_context(http_credentials={"username": "", "password": key})
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"{gateway.url}/")
        assert page.locator(f"img[src^='{THUMBNAIL}']").first.evaluate("one => one.naturalWidth") > 0
        assert len(colours(page.locator(".chart").first.screenshot())) >= 4, "styles and charts are let in"
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=document.title=1>')")
        page.wait_for_timeout(200)
        assert page.title() == "pydoc: v3 is in charge" and complaints, "the policy let a script run"
        complaints.clear()
        page.get_by_role("link", name="Its evaluation").first.click()
        assert page.url == f"{gateway.url}/{EVALUATION}" and page.title() == "v3: reject"
        page.go_back()
        assert complaints == []
        said: list[str] = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.get_by_role("link", name="Evidently's report").click()
        page.get_by_text("Dataset Drift").first.wait_for(timeout=scaled(20_000))
        assert said == []
        assert page.evaluate("window.origin") == "null"
        context.close()


def write_evidently(path: Path) -> None:
    """Write a report as the monitor does, of two columns."""
    rows = pd.DataFrame({"characters": range(40), "words": range(40)}, dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Evidently's dependencies
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset, DataSummaryPreset

        side = Dataset.from_pandas(rows, data_definition=DataDefinition(numerical_columns=list(rows)))
        Report([DataDriftPreset(), DataSummaryPreset()]).run(side, side).save_html(str(path))


def test_retention_has_a_cell_for_every_version_and_slice_in_shades_that_differ(look: Any) -> None:
    table = look("evaluation").page.locator(".heat")

    assert table.locator("tbody tr").count() == len(RETENTION.versions) and table.locator(
        "td"
    ).count() == len(RETENTION.versions) * len(RETENTION.slices)
    assert table.get_by_text("not asked").count() == 1
    assert len(colours(table.screenshot())) >= 5


def test_the_schemes_differ(look: Any) -> None:
    light, dark = (
        look("busy", scheme=scheme).page.evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in SCHEMES
    )

    assert luminance(light) > 0.8 and luminance(dark) < 0.05


def test_the_charts_are_drawn(look: Any) -> None:
    """As seen, not as written: pixels of at least the colours of four versions, and a picture that is not
    blank.
    """
    page = look("busy").page
    chart = page.locator(".chart").first
    assert chart.locator("rect").count() > 30
    assert len(colours(chart.screenshot())) >= 4

    assert len(colours(page.screenshot(full_page=True))) >= 8


def test_every_part_has_a_name_for_screen_readers(look: Any) -> None:
    page = look("busy").page

    assert page.get_by_role("heading", level=1).count() == 1
    assert page.locator("section").count() == page.get_by_role("region").count() >= 6
    assert all(
        len(name) > 20
        for name in page.locator("svg[role=img]").evaluate_all(
            "all => all.map(one => one.getAttribute('aria-label') || '')"
        )
    )


def test_it_is_whole_with_scripts_switched_off(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["busy"].as_uri())

    assert page.get_by_text("Rollout of v4").is_visible()
    page.get_by_text("Verdicts before it").click()
    assert page.get_by_role("columnheader", name="When (UTC)").is_visible()
    context.close()


def colours(png: bytes) -> list[tuple[int, ...]]:
    """Of at least a ten-thousandth of the picture's pixels, dull ones counted too."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    found = picture.getcolors(picture.width * picture.height) or []
    return [colour for count, colour in found if count > picture.width * picture.height / 10_000]


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
