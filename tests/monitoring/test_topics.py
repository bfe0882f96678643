"""Topics: words that grew beyond chance, rows that share them, names and examples that tell."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from ratchet.monitoring.topics import belongs, find_topics, grown_terms
from ratchet.monitoring.verdicts import Topic

PLACES = ["file", "socket", "date", "thread", "parser", "queue", "signal", "buffer", "codec", "locale"]
VERBS = ["open", "close", "read", "write", "lock", "flush", "copy", "check"]


def known(count: int, seed: int = 0) -> list[str]:
    chance = np.random.default_rng(seed)
    return [
        f"how to {chance.choice(VERBS)} the {chance.choice(PLACES)} number {chance.integers(10_000)}"
        for _ in range(count)
    ]


def about(words: list[str], count: int, seed: int = 0) -> list[str]:
    chance = np.random.default_rng(seed)
    return [
        f"how to {chance.choice(VERBS)} the {' '.join(chance.permutation(words)[:2])} number "
        f"{chance.integers(10_000)}"
        for _ in range(count)
    ]


BOAT, BREAD = ["rudder", "keel", "anchor"], ["dough", "yeast", "crust"]


def test_two_new_subjects_become_two_topics_that_keep_apart():
    window = [*known(200, 1), *about(BOAT, 40), *about(BREAD, 25)]
    topics = find_topics(window, known(400, 2), known(1000, 3), most=8, seed=0)
    assert len(topics) >= 2 and all(
        set(topic.terms) <= set(BOAT) or set(topic.terms) <= set(BREAD) for topic in topics
    ), topics
    assert topics[0].share > topics[-1].share or len(topics) == 1
    rows = [text for text in window if any(belongs(topic, text) for topic in topics)]
    assert set(rows) == {*about(BOAT, 40), *about(BREAD, 25)}


def test_a_topic_tells_its_shares_and_shows_rows_of_the_window():
    window = [*known(150, 1), *about(BOAT, 50)]
    topic = find_topics(window, known(400, 2), known(1000, 3), most=1, seed=0)[0]
    assert topic.share == pytest.approx(0.25) and topic.reference_share == 0.0
    assert (
        topic.name == ", ".join(topic.terms[:3])
        and len(topic.examples) == 3
        and set(topic.examples) <= set(about(BOAT, 50))
    )


def test_no_word_that_is_as_common_as_before_is_a_term():
    assert grown_terms(known(300, 1), known(2000, 2)) == {}
    assert find_topics(known(300, 1), known(400, 2), known(1000, 3), most=8, seed=0) == []


def test_a_known_word_that_grew_much_is_a_term_and_one_that_grew_little_is_none():
    before = [*known(1000, 1), *["a rare winch"] * 10]
    assert "winch" in grown_terms([*known(180, 2), *["the winch"] * 20], before)
    assert "winch" not in grown_terms([*known(197, 2), *["the winch"] * 3], before)


def test_numbers_and_short_words_are_no_terms():
    assert grown_terms(["12345 ab zebra"] * 10, known(500)).keys() == {"zebra"}


def test_the_same_window_gives_the_same_topics_and_they_travel_as_json():
    window = [*known(200, 1), *about(BOAT, 40), *about(BREAD, 25)]
    first, again = (find_topics(window, known(400, 2), known(1000, 3), most=3, seed=5) for _ in range(2))
    assert first == again
    assert msgspec.json.decode(msgspec.json.encode(first), type=list[Topic]) == first


KNOWN = {
    "zh": ["如何打开文件", "怎样关闭窗口", "如何复制文本", "怎样检查日期", "如何锁定屏幕"],
    "ja": ["ファイルを開く方法", "窓を閉じる方法", "文章を写す方法", "日付を確認する方法", "画面を消す方法"],
    "th": ["วิธีเปิดไฟล์", "วิธีปิดหน้าต่าง", "วิธีคัดลอกข้อความ", "วิธีตรวจวันที่", "วิธีล็อกหน้าจอ"],
    "hi": ["फ़ाइल कैसे खोलें", "खिड़की कैसे बंद करें", "पाठ कैसे लिखें", "तारीख कैसे जाँचें", "पर्दा कैसे रोकें"],
    "ar": ["كيف أفتح الملف", "كيف أغلق النافذة", "كيف أنسخ النص", "كيف أفحص التاريخ", "كيف أقفل الشاشة"],
}
NEW = {
    "zh": ("洪水", ["洪水损失怎么赔", "洪水之后怎样赔", "洪水淹了车库"]),
    "ja": ("洪水", ["洪水の損害は補償されますか", "洪水で車が壊れた", "洪水の後の掃除"]),
    "th": ("ท่วม", ["น้ำท่วมบ้านทำอย่างไร", "ประกันจ่ายน้ำท่วมไหม", "รถถูกน้ำท่วม"]),
    "hi": ("बाढ़", ["बाढ़ का मुआवज़ा", "बाढ़ में गाड़ी डूबी", "बाढ़ के बाद सफ़ाई"]),
    "ar": ("الفيضان", ["تعويض الفيضان", "الفيضان أغرق السيارة", "تنظيف بعد الفيضان"]),
}


@pytest.mark.parametrize("language", KNOWN)
def test_a_topic_has_a_name_in_every_script(language):
    old, (word, new) = KNOWN[language], NEW[language]
    window = [f"{text} {number}" for number in range(20) for text in [*old, *new]]
    reference = [f"{text} {number}" for number in range(60) for text in old]
    topics = find_topics(window, reference, reference * 2, most=1, seed=0)

    assert len(topics) == 1 and any(term in word or word in term for term in topics[0].terms)
    assert topics[0].share == pytest.approx(60 / 160) and topics[0].reference_share == 0
    assert all(belongs(topics[0], text) for text in new) and not any(belongs(topics[0], text) for text in old)


@pytest.mark.parametrize("most", [1, 8])
def test_rows_that_share_all_their_new_words_are_one_topic(most):
    words = "the rudder keel anchor mast sail hull deck bow stern helm"
    window = [*known(200, 1), *(f"{words} {number}" for number in range(60))]
    topics = find_topics(window, known(400, 2), known(1000, 3), most=most, seed=0)

    assert len(topics) == 1 and topics[0].share == pytest.approx(60 / 260)
    assert set(topics[0].terms) <= set(words.split())
