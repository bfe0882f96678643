"""Words of every script: ASCII as it always was, nothing cut inside a grapheme, characters elsewhere."""

from __future__ import annotations

import re

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from ratchet.data.words import is_pair, terms_of, words_of
from ratchet.evaluation.metrics import rouge_2, rouge_l, token_f1
from ratchet.monitoring.novelty import COLUMNS, Familiar

CHINESE = ("保险全额赔偿洪水损失", "保险赔偿洪水损失")
THAI = ("ประกันคุ้มครองน้ำท่วม", "ประกันไม่คุ้มครองน้ำท่วม")
HINDI = ("बीमा बाढ़ की हानि को कवर करता है", "बीमा हानि को कवर करता है")
ARABIC = ("التأمين يُغَطّي أضرار الفيضان", "التأمين يُغَطّي الفيضان")
JAPANESE = ("保険は洪水の損害を補償します", "保険は損害を補償します")
ALL = [CHINESE, THAI, HINDI, ARABIC, JAPANESE]


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_those_of_every_score_so_far(text):
    assert words_of(text) == terms_of(text) == re.findall(r"\w+", text.lower())


@pytest.mark.parametrize("pair", ALL)
@given(data=st.data())
def test_no_word_begins_or_ends_inside_a_grapheme(pair, data):
    text = data.draw(st.text(st.sampled_from(sorted(set("".join(pair))))))
    edges = {0, *(match.end() for match in regex.finditer(r"\X", text))}
    place = 0
    for word in words_of(text):
        place = text.index(word, place)
        assert {place, place + len(word)} <= edges, (text, word)
        place += len(word)


@pytest.mark.parametrize("pair", [HINDI, ARABIC])
def test_words_with_marks_are_whole(pair):
    for text in pair:
        assert words_of(text) == terms_of(text) == text.split()


@pytest.mark.parametrize("pair", [CHINESE, JAPANESE, THAI])
def test_characters_are_words_where_no_blanks_are_and_terms_are_pairs(pair):
    for text in pair:
        assert words_of(text) == regex.findall(r"\X", text)
        assert all(is_pair(term) for term in terms_of(text))
        assert len(terms_of(text)) == len(words_of(text)) - 1


def test_scripts_beside_each_other_are_apart():
    assert words_of("iPhoneを修理 2台") == ["iphone", "を", "修", "理", "2", "台"]
    assert terms_of("iPhoneを修理 2台") == ["iphone", "を修", "修理", "2", "台"]
    assert words_of("スマートフォンの保険") == ["スマートフォン", "の", "保", "険"]
    assert words_of("Größe: 3,5 µm") == ["größe", "3", "5", "µm"]
    assert not is_pair("of") and not is_pair("保") and not is_pair("保险全")


@pytest.mark.parametrize("pair", ALL)
def test_answers_that_say_nearly_the_same_score_high_in_every_script(pair):
    assert all(metric(*pair) > 0.75 for metric in (token_f1, rouge_l))
    assert 0.3 < rouge_2(*pair) < 1 and token_f1(pair[0], pair[0]) == 1


def test_a_hand_computes_the_same_for_chinese():
    assert [token_f1(*CHINESE), rouge_l(*CHINESE)] == pytest.approx([16 / 18] * 2)


def test_answers_about_something_else_score_low():
    assert token_f1("保险全额赔偿洪水损失", "天气很好") == 0
    assert rouge_l("ประกันคุ้มครองน้ำท่วม", "สวัสดี") < 0.3


@pytest.mark.parametrize("pair", ALL)
def test_a_new_subject_is_less_familiar_than_a_known_one_in_every_script(pair):
    familiar = Familiar([f"{text} {number}" for text in pair for number in range(20)])
    other = "".join(chr(ord(letter) + 1) if letter.isalpha() else letter for letter in pair[0])
    columns = familiar.columns([f"{pair[0]} 3", other])

    for name in COLUMNS:
        assert columns[name][0] < columns[name][1], name
