"""An evaluation as people see it, on its page and in the terminal: the same things, whole, and nobody's words
do anything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from html import unescape
from pathlib import Path

import msgspec
import pytest
from evaluation_reports import BATCHES, HOSTILE, RETENTION, make_reports

from ratchet.errors import RatchetError
from ratchet.federation.records import Part, Round
from ratchet.files import read_json, write_json
from ratchet.promotion.verdict import Candidate, Rival
from ratchet.reporting import evaluation_page
from ratchet.reporting.evaluation_page import gather, keep_page, render_evaluation
from ratchet.reporting.terminal import print_evaluation


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reports(tmp_path_factory.mktemp("judged") / "reports of v3")


def test_twenty_rows_that_got_better_and_twenty_that_got_worse_are_shown(reports):
    found = gather(reports, "v3", RETENTION)
    assert ([row.gain for row in found.better], [row.gain for row in found.worse]) == (
        [1.0] * 20,
        [-1.0] * 20,
    )
    assert {(row.before == "wanted", row.now == "wanted") for row in found.better} == {(False, True)}
    assert {(row.before == "wanted", row.now == "wanted") for row in found.worse} == {(True, False)}
    assert {int(row.id[-3:]) // 30 for row in found.better} == {0}


@pytest.mark.parametrize("rows", [None, b"no table"], ids=["gone", "broken"])
def test_a_table_that_cannot_be_read_is_said_and_the_rest_is_shown(tmp_path, reports, rows):
    folder = Path(shutil.copytree(reports, tmp_path / "reports"))
    table = folder / "reports/evaluation/scores.parquet"
    table.unlink() if rows is None else table.write_bytes(rows)
    found = gather(folder, "v3", RETENTION)
    assert found.rows_fault
    page = render_evaluation(found)
    assert "Cannot be read." in page
    assert ">Retention<" in page


def test_without_a_verdict_there_is_no_page(tmp_path):
    with pytest.raises(RatchetError, match=r"gate\.json does not exist"):
        gather(tmp_path, "v3")


def test_the_page_says_everything_in_order_and_escapes_it(reports):
    page = render_evaluation(gather(reports, "v3", RETENTION))
    headings = [unescape(text) for text in re.findall(r"<h[12][^>]*>(.*?)</h", page)]
    assert "the candidate lost 20 points on what batch 20260201T000000Z-<script>" in headings[0]
    assert headings[0].startswith("Kept the champion (v1): ") and "\u202e" not in headings[0]
    assert headings[1:] == [
        "Every check",
        "Figures",
        "Slices",
        "Retention",
        "Rows that got better",
        "Rows that got worse",
        "Training",
    ]
    assert "<script>" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") > 40
    assert page.count('<path class="line') == 2
    assert "0.350<small>0.300 to 0.400</small>" in page


def test_an_old_evaluation_without_slices_regions_and_retention_has_a_page(tmp_path, reports):
    folder = Path(shutil.copytree(reports, tmp_path / "reports"))
    gate = read_json(folder / "reports/gate.json")
    write_json(
        folder / "reports/gate.json",
        {key: value for key, value in gate.items() if key not in ("slices", "regions")}
        | {"rival": {"model": "base", "version": None}},
    )
    (folder / "reports/train/history.jsonl").unlink()
    page = render_evaluation(gather(folder, "v1"))
    assert "against the untouched base" in page
    assert "No curve was recorded." in page
    assert "It could not be read here" in page


def test_the_terminal_says_the_same(reports, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    print_evaluation(gather(reports, "v3", RETENTION))
    said = capsys.readouterr().out
    assert said.startswith("Kept the champion (v1): the candidate lost 20 points on what batch ")
    for part in (
        "v3 against v1: ❌ reject",
        "✗ past:",
        "test rows",
        "by batch",
        "kind:module",
        "not asked",
        "20 rows that got better",
        "20 rows that got worse",
        "training: loss",
    ):
        assert part in said
    assert "[bold]" in said  # shown, not obeyed
    assert "\u202e" not in said.split("20 rows that got better")[1]
    assert (
        said.index("reject")
        < said.index("test rows")
        < said.index("not asked")
        < said.index("got better")
        < said.index("training")
    )


def test_what_is_gathered_is_json(reports):
    found = json.loads(json.dumps(gather(reports, "v3", RETENTION).to_json()))
    assert found["retention"]["slices"][:2] == list(BATCHES)
    assert found["sentence"].startswith("Kept the champion (v1): ")
    assert HOSTILE in found["better"][0]["question"]


def test_a_version_that_was_forced_says_so(reports):
    found = msgspec.structs.replace(gather(reports, "v3"), promoted=True)
    assert "Promoted although the candidate lost 20 points" in render_evaluation(found)


def test_the_page_is_kept_by_candidate_and_rival_and_the_oldest_make_room(tmp_path, reports, monkeypatch):
    monkeypatch.setattr(evaluation_page, "MOST_KEPT", 2)
    found, kept = gather(reports, "v3"), []
    for number, rival in enumerate((1, None, 7)):
        against = Rival("base" if rival is None else "champion", rival)
        judged = msgspec.structs.replace(found.decision, rival=against)
        kept.append(keep_page(tmp_path, msgspec.structs.replace(found, decision=judged)))
        os.utime(kept[-1], (number, number))
    assert [path.name for path in kept[1:]] == [
        "aaaaaaaaaaaa-against-base.html",
        "aaaaaaaaaaaa-against-v7.html",
    ]
    assert sorted((tmp_path / evaluation_page.KEPT).iterdir()) == sorted(kept[1:])
    odd = msgspec.structs.replace(found.decision, candidate=Candidate("key", "../../../etc/passwd"))
    assert evaluation_page.kept_page(odd).parent == evaluation_page.KEPT


def test_the_rounds_of_a_federation_are_shown(tmp_path, reports, capsys):
    folder = Path(shutil.copytree(reports, tmp_path / "reports"))
    part = Part("north", 62, 4, 1.0, 2.5, 2.25, 3.2)
    record = Round(1, "both", [part], {HOSTILE: "it did not answer"}, 62, 31.4, 2**20, 2**19, 1.0)
    write_json(folder / "reports/train/rounds.json", msgspec.to_builtins([record]))
    found = gather(folder, "v3", RETENTION)
    page = render_evaluation(found)
    assert "<h3>Rounds</h3>" in page and "ε = 3.2" in page and HOSTILE not in page
    print_evaluation(found)
    assert "north (ε = 3.2); 62 rows, training loss 2.5000" in " ".join(capsys.readouterr().out.split())
    assert "Rounds" not in render_evaluation(gather(reports, "v3", RETENTION))
