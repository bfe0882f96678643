"""Compare the trainer's answers with those of another path to the same rows, up to what rounding explains.

Where the two choose different tokens whose logits in the trainer lie within twice the tolerance, it is a tie:
it is counted, it is no mismatch, and the rest of that row is not compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from ratchet.models.chat_template import ChatFormat
from ratchet.parity.paths import Answer, Top, scale
from ratchet.parity.report import Mismatch, Part, Token

# Share of positions whose logits may differ by more than the tolerance: where attention changes sharply, the
# last bit of a float moves them far.
STRAY = 0.01
BROKEN = 1e6  # in place of a difference that is NaN or infinite
WAYS = {"gateway": "the gateway's engine gives", "merged": "the merged model gives"}


def compare_prompts(
    ids: Sequence[str], wanted: Sequence[Answer], told: Sequence[Answer], ours: ChatFormat, theirs: ChatFormat
) -> Part:
    """Compare the prompts of all rows, token by token."""
    pairs = zip(ids, wanted, told, strict=True)
    found = [fault for id, one, other in pairs if (fault := _compare_prompt(id, one, other, ours, theirs))]
    reason = f"{len(ids)} test rows have the same prompts, token for token"
    return make_part("prompts", len(ids), found, reason)


def compare_answers(
    name: str,
    ids: Sequence[str],
    wanted: Sequence[Answer],
    tops: Sequence[Top],
    told: Sequence[Answer],
    apart: Sequence[Tensor],
    tolerance: float,
    ours: ChatFormat,
    theirs: ChatFormat,
    *,
    context: int | None = None,
) -> Part:
    """Compare greedy answers and logits; `apart` holds a tensor per row, the logits' difference by position.

    An answer that was cut off at `context` tokens, the prompt included, is compared up to that point.
    """
    found: list[Mismatch] = []
    ties = compared = 0
    for id, one, other, top in zip(ids, wanted, told, tops, strict=True):
        if _compare_prompt(id, one, other, ours, theirs):
            continue  # counted by compare_prompts; a different prompt explains a different answer
        compared += 1
        full = context is not None and len(other.prompt) + len(other.ids) >= context
        if full and other.finish == "length":
            one = one._replace(ids=one.ids[: len(other.ids)], text=other.text, finish="length")
        place = first_difference(one.ids, other.ids)
        if place is not None and _is_tie(top, place, one.ids, other.ids, tolerance):
            ties += 1
        elif fault := compare_row(id, one, other, ours, theirs):
            found.append(fault)
    shares = torch.cat([*apart]).nan_to_num(nan=BROKEN, posinf=BROKEN) if apart else torch.zeros(1)
    largest, stray = float(shares.max()), float((shares > tolerance).float().mean())
    if not found and stray > STRAY:
        row = max(range(len(apart)), key=lambda index: float(apart[index].max()))
        place = int(apart[row].argmax())
        same = wanted[row].ids[place : place + 1]
        what = (
            f"the logits differ by up to {largest:.2g} of the largest one, "
            f"{stray:.1%} of the positions by more than {tolerance:g}"
        )
        found.append(make_mismatch(ids[row], place, same, same, ours, theirs, what))
    reason = (
        f"{WAYS.get(name, f'{name} gives')} the same greedy answers to {compared} test rows ({ties} ties), "
        f"the logits within {largest:.2g} of the largest one ({tolerance:g} is taken)"
    )
    part = make_part(name, compared, found, reason)
    return msgspec.structs.replace(part, ties=ties, tolerance=tolerance, largest=largest)


def _is_tie(top: Top, place: int, one: list[int], other: list[int], tolerance: float) -> bool:
    """Return whether the logits of both tokens lie within twice the tolerance.

    Each may be off by the tolerance, so two logits that are that close may change places.
    """
    if place >= min(len(one), len(other)):
        return False
    at = {int(token): float(logit) for token, logit in zip(top.ids[place], top.logits[place], strict=True)}
    ours, theirs = at.get(one[place]), at.get(other[place])
    if ours is None or theirs is None:
        return False
    return abs(ours - theirs) <= 2 * tolerance * float(scale(top)[place])


def compare_row(id: str, one: Answer, other: Answer, ours: ChatFormat, theirs: ChatFormat) -> Mismatch | None:
    """Return the earliest mismatch of a row, or None."""
    if fault := _compare_prompt(id, one, other, ours, theirs):
        return fault
    start, place = len(one.prompt), first_difference(one.ids, other.ids)
    if place is not None:
        wanted, seen = one.ids[place : place + 1], other.ids[place : place + 1]
        return make_mismatch(id, start + place, wanted, seen, ours, theirs, "the answers differ")
    if one.finish != other.finish:
        what = f"the answer ended by {other.finish!r}, wanted {one.finish!r}: the stop token did not end it"
    elif one.text != other.text:
        what = f"the same tokens became the text {other.text[-60:]!r}, wanted {one.text[-60:]!r}"
    else:
        return None
    return make_mismatch(id, start + len(one.ids) - 1, one.ids[-1:], other.ids[-1:], ours, theirs, what)


def _compare_prompt(
    id: str, one: Answer, other: Answer, ours: ChatFormat, theirs: ChatFormat
) -> Mismatch | None:
    if other.fault:
        what = f"the gateway answered with a fault: {' '.join(other.fault.split())[:200]}"
        return make_mismatch(id, len(other.prompt) + len(other.ids), [], [], ours, theirs, what)
    place = first_difference(one.prompt, other.prompt)
    if place is None:
        return None
    wanted, seen = one.prompt[place : place + 1], other.prompt[place : place + 1]
    return make_mismatch(id, place, wanted, seen, ours, theirs, "the prompts differ")


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the first position that differs, or None; the end of the shorter one counts as well."""
    if list(one) == list(other):
        return None
    return next(
        (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right),
        min(len(one), len(other)),
    )


def make_mismatch(
    id: str,
    position: int,
    wanted: Sequence[int],
    seen: Sequence[int],
    ours: ChatFormat,
    theirs: ChatFormat,
    what: str,
) -> Mismatch:
    """Describe a mismatch; `wanted` and `seen` hold the token at that position, or nothing."""
    return Mismatch(id, position, _token(wanted, ours), _token(seen, theirs), what)


def _token(ids: Sequence[int], chat: ChatFormat) -> Token | None:
    if not ids:
        return None
    return Token(ids[0], str(chat.tokenizer.decode(list(ids[:1]), skip_special_tokens=False)))


def make_part(name: str, rows: int, found: Sequence[Mismatch], reason: str) -> Part:
    """Return the result of a comparison; `reason` is what a comparison without mismatches shows."""
    if not found:
        return Part(name, rows, 0, reason)
    first = found[0]
    where = (
        f"row {first.row}, token {first.position}: {_quote(first.wanted)} by the trainer, "
        f"{_quote(first.seen)} by the other way"
    )
    reason = f"{name}: {len(found)} of {rows} rows differ. First: {first.what} ({where})"
    return Part(name, rows, len(found), reason, first)


def _quote(token: Token | None) -> str:
    return f"{token.text!r} ({token.id})" if token else "nothing"
