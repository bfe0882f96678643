"""The coordinator learns the sum of the nodes' vectors, exactly, and no single one."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet.errors import DataError, UserError
from ratchet.federation.masking import (
    PRIME,
    STEPS,
    Member,
    Publics,
    Revealed,
    Share,
    Words,
    combine,
    decode,
    encode,
    split,
    unmask,
)

TAG = b"round 1"


class Round:
    """All messages of one round, as a coordinator relays them."""

    def __init__(self, vectors: list[Words], threshold: int) -> None:
        self.vectors, self.threshold = vectors, threshold
        self.members = {place: Member(place, TAG, threshold) for place in range(1, len(vectors) + 1)}
        self.publics: dict[int, Publics] = {place: member.publics for place, member in self.members.items()}
        letters = {place: member.deal(self.publics) for place, member in self.members.items()}
        self.letters = {
            place: {sender: sent[place] for sender, sent in letters.items() if sender != place}
            for place in letters
        }

    def mask(self, place: int) -> Words:
        return self.members[place].mask(self.letters[place], self.vectors[place - 1])

    def masked(self, away: set[int]) -> dict[int, Words]:
        return {place: self.mask(place) for place in self.members if place not in away}

    def finish(self, away: set[int], silent: frozenset[int] = frozenset()) -> Words:
        """`away`: nodes that never sent their vector; `silent`: those that are gone when shares are asked."""
        masked = self.masked(away)
        revealed = [
            member.reveal(masked.keys(), away)
            for place, member in self.members.items()
            if place not in away | silent
        ]
        return unmask(masked, self.publics, revealed, tag=TAG, threshold=self.threshold)


def vectors(count: int, seed: int = 0, size: int = 50) -> list[Words]:
    chance = np.random.default_rng(seed)
    return [encode(chance.normal(scale=3, size=size), count) for _ in range(count)]


@settings(deadline=None, max_examples=25)
@given(count=st.integers(2, 6), data=st.data())
def test_the_sum_is_exact_whoever_drops_out(count: int, data: st.DataObject) -> None:
    threshold = count // 2 + 1
    places = list(range(1, count + 1))
    most = count - threshold
    away = set(data.draw(st.lists(st.sampled_from(places), max_size=most, unique=True)))
    left = [place for place in places if place not in away]
    silent = frozenset(
        data.draw(st.lists(st.sampled_from(left), max_size=len(left) - threshold, unique=True))
    )
    sent = vectors(count, seed=count)
    found = Round(sent, threshold).finish(away, silent)
    wanted = np.sum([sent[place - 1] for place in left], axis=0, dtype=np.uint64)
    assert np.array_equal(found, wanted)


def test_numbers_come_back_to_a_step() -> None:
    values = np.array([0.0, 1.5, -2.25, 1e6, -1e-9, 0.1])
    summed = encode(values, 3) + encode(-2 * values, 3) + encode(values * 0.5, 3)
    assert decode(summed) == pytest.approx(-values / 2, abs=1.5 / STEPS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
def test_numbers_that_would_spoil_the_sum_are_refused(value: float) -> None:
    with pytest.raises(DataError, match="not finite or over"):
        encode(np.array([0.0, value]), 4)


# --- what the coordinator sees ---


def test_a_masked_vector_is_no_more_than_noise() -> None:
    sent = [encode(np.zeros(20_000), 3)] * 3
    masked = Round(sent, 2).masked(set())
    for vector in masked.values():
        bits = np.unpackbits(vector.view(np.uint8))
        assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(bits.size)
    for one, other in itertools.combinations(masked.values(), 2):
        assert not (one == other).any()


def test_the_coordinator_and_a_node_that_helps_it_get_only_the_sum_of_two_honest_ones() -> None:
    sent = vectors(3)
    held = Round(sent, 2)
    masked = held.masked(set())
    revealed = [member.reveal(masked.keys(), set()) for member in held.members.values()]
    traitor = held.members[3]
    # All masks that they know: those of each node alone, and those of the pairs with the traitor.
    from ratchet.federation.masking import _pair_mask, _stream

    known = {}
    for place in (1, 2):
        seed = combine([each.seeds[place] for each in revealed], 2)
        pair = _pair_mask(traitor._key, 3, place, held.publics[place].masks, TAG, 50)
        known[place] = masked[place] - _stream(seed, 50) + pair
    assert np.array_equal(known[1] + known[2], sent[0] + sent[1])
    for place in (1, 2):
        assert not (known[place] == sent[place - 1]).any()


def test_one_round_s_masks_are_not_the_next_one_s() -> None:
    sent = vectors(3)
    first, second = (Round(sent, 2).masked(set()) for _ in range(2))
    assert not any((first[place] == second[place]).any() for place in first)


@pytest.mark.parametrize(
    ("sent", "dropped"),
    [({1, 2, 3}, {3}), ({1}, {2, 3}), (set(), {1, 2, 3})],
    ids=["both", "alone", "none"],
)
def test_a_node_gives_no_shares_that_would_show_a_single_vector(sent: set[int], dropped: set[int]) -> None:
    held = Round(vectors(3), 2)
    with pytest.raises(UserError, match="would show a single node's update"):
        held.members[1].reveal(sent, dropped)


def test_a_restored_member_repeats_itself_and_answers_nothing_else() -> None:
    held = Round(vectors(4), 3)
    masked, before = held.masked(set()), held.members[1]
    shares, letters = before.reveal(masked.keys(), set()), before.deal(held.publics)
    after = Member.restore(json.loads(json.dumps(before.state())))
    assert after.publics == before.publics and after.deal(held.publics) == letters
    assert np.array_equal(after.mask(held.letters[1], held.vectors[0]), masked[1])
    assert after.reveal(masked.keys(), set()) == shares
    with pytest.raises(UserError, match="letters for other nodes"):
        after.deal({place: held.publics[place] for place in (1, 2, 3)})
    fewer = {sender: letter for sender, letter in held.letters[1].items() if sender != 4}
    for letters_in, words in ((fewer, held.vectors[0]), (held.letters[1], held.vectors[1])):
        with pytest.raises(UserError, match="another vector under the same masks"):
            after.mask(letters_in, words)


def test_a_node_answers_one_question_about_who_is_there() -> None:
    member = Round(vectors(4), 3).members[1]
    first = member.reveal({1, 2, 3}, {4})
    assert member.reveal({1, 2, 3}, {4}) == first
    with pytest.raises(UserError, match="would show"):
        member.reveal({1, 2, 4}, {3})


# --- what can go wrong ---


def test_too_few_nodes_end_the_round_without_a_sum() -> None:
    held = Round(vectors(4), 3)
    masked = held.masked({4})
    revealed = [held.members[place].reveal(masked.keys(), {4}) for place in (1, 2)]
    with pytest.raises(UserError, match="2 shares of a secret are here, 3 are needed"):
        unmask(masked, held.publics, revealed, tag=TAG, threshold=3)


def test_a_letter_that_was_changed_is_not_opened() -> None:
    held = Round(vectors(3), 2)
    letter = bytearray(held.letters[1][2])
    letter[5] ^= 1
    with pytest.raises(DataError, match="letter of node 2"):
        held.members[1].mask(held.letters[1] | {2: bytes(letter)}, held.vectors[0])


def test_a_letter_is_for_one_receiver() -> None:
    held = Round(vectors(3), 2)
    with pytest.raises(DataError, match="letter of node 2"):
        held.members[1].mask(held.letters[1] | {2: held.letters[3][2]}, held.vectors[0])


def test_a_wrong_share_is_noticed() -> None:
    held = Round(vectors(3), 2)
    masked = held.masked({3})
    revealed = [held.members[place].reveal(masked.keys(), {3}) for place in (1, 2)]
    wrong = Share(2, (revealed[1].keys[3].value + 1) % PRIME)
    with pytest.raises(DataError, match=r"another key|do not fit"):
        unmask(
            masked,
            held.publics,
            [revealed[0], Revealed({3: wrong}, revealed[1].seeds)],
            tag=TAG,
            threshold=2,
        )


def test_a_node_deals_no_letters_for_a_round_without_its_own_keys() -> None:
    members = {place: Member(place, TAG, 2) for place in (1, 2, 3)}
    publics = {place: member.publics for place, member in members.items()}
    with pytest.raises(UserError, match="1 nodes for a threshold of 2"):
        members[1].deal({1: publics[1]})
    with pytest.raises(UserError, match="own keys"):
        members[1].deal({1: publics[2], 2: publics[3]})
    crowd = {place: Member(place, TAG, 2).publics for place in (2, 3, 4)}
    with pytest.raises(UserError, match="raise the threshold over half"):
        members[1].deal({1: publics[1], **crowd})


@settings(deadline=None, max_examples=30)
@given(secret=st.binary(min_size=32, max_size=32), threshold=st.integers(1, 5), data=st.data())
def test_any_shares_up_to_the_threshold_give_the_secret(
    secret: bytes, threshold: int, data: st.DataObject
) -> None:
    shares = split(secret, range(1, 7), threshold)
    chosen = data.draw(st.lists(st.sampled_from(sorted(shares)), min_size=threshold, unique=True))
    assert combine([shares[place] for place in chosen], threshold) == secret
    if threshold > 1:
        with pytest.raises(UserError, match="are needed"):
            combine([shares[place] for place in chosen[: threshold - 1]], threshold)
