"""Two ways' answers to the same rows side by side: where the first token differs, and whether floats alone explain it.

Where two ways choose different tokens and the trainer's own logits of both lie within twice the tolerance, it is a tie: counted, no
mismatch; what follows it in that row is not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ratchet.models.chat_template import ChatFormat
from ratchet.parity.paths import Answer, Top, scale

STRAY = 0.01  # share of positions whose logits may lie beyond the tolerance: at a sharp bend of an attention a last bit moves them far
BROKEN = 1e6  # in place of a difference that is no number
WAYS = {"gateway": "the gateway's engine gives", "merged": "the merged model gives"}


class Part(NamedTuple):
    """One comparison. `first` tells the first mismatch: row, position, the tokens of both ways."""

    name: str
    rows: int
    mismatches: int
    reason: str
    first: dict[str, Any] | None = None
    ties: int = 0
    tolerance: float | None = None
    largest: float | None = None  # difference of logits, as a share of the largest one

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "result": "fail" if self.mismatches else "pass"}


def compare_prompts(
    ids: Sequence[str], wanted: Sequence[Answer], told: Sequence[Answer], ours: ChatFormat, theirs: ChatFormat
) -> Part:
    found = [
        fault
        for id, one, other in zip(ids, wanted, told, strict=True)
        for fault in compare_prompt(id, one, other, ours, theirs)
    ]
    return make_part(
        "prompts", len(ids), found, f"{len(ids)} test rows have the same prompts, token for token"
    )


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
    """Greedy answers and logits of another way. `context`: an answer that was cut off by that many tokens, the prompt's among them, is compared as far as it goes."""
    found: list[dict[str, Any]] = []
    ties = compared = 0
    for id, one, other, top in zip(ids, wanted, told, tops, strict=True):
        if compare_prompt(id, one, other, ours, theirs):
            continue  # told apart from this; other answers follow from it
        compared += 1
        cut = (
            context is not None and other.finish == "length" and len(other.prompt) + len(other.ids) >= context
        )
        one = one._replace(ids=one.ids[: len(other.ids)], text=other.text, finish="length") if cut else one
        place = first_difference(one.ids, other.ids)
        if place is not None and _is_tie(top, place, one.ids, other.ids, tolerance):
            ties += 1
        else:
            found += compare_row(id, one, other, ours, theirs)
    shares = torch.cat([*apart]).nan_to_num(nan=BROKEN, posinf=BROKEN) if apart else torch.zeros(1)
    largest, stray = float(shares.max()), float((shares > tolerance).float().mean())
    if not found and stray > STRAY:
        row = max(range(len(apart)), key=lambda index: float(apart[index].max()))
        place = int(apart[row].argmax())
        what = f"the logits differ by up to {largest:.2g} of the largest one, {stray:.1%} of the positions by more than {tolerance:g}"
        found.append(
            mismatch(
                ids[row],
                place,
                wanted[row].ids[place : place + 1],
                wanted[row].ids[place : place + 1],
                ours,
                theirs,
                what,
            )
        )
    reason = f"{WAYS.get(name, f'{name} gives')} the same greedy answers to {compared} test rows ({ties} ties), the logits within {largest:.2g} of the largest one ({tolerance:g} is taken)"
    return make_part(name, compared, found, reason)._replace(ties=ties, tolerance=tolerance, largest=largest)


def _is_tie(top: Top, place: int, one: list[int], other: list[int], tolerance: float) -> bool:
    """Two logits that may each be off by the tolerance may change places when they are within twice of it."""
    if place >= min(len(one), len(other)):
        return False
    at = {int(token): float(logit) for token, logit in zip(top.ids[place], top.logits[place], strict=True)}
    pair = [at.get(one[place]), at.get(other[place])]
    return (
        pair[0] is not None
        and pair[1] is not None
        and abs(pair[0] - pair[1]) <= 2 * tolerance * float(scale(top)[place])
    )


def compare_row(
    id: str, one: Answer, other: Answer, ours: ChatFormat, theirs: ChatFormat
) -> list[dict[str, Any]]:
    """At most one mismatch: the earliest."""
    if found := compare_prompt(id, one, other, ours, theirs):
        return found
    start = len(one.prompt)
    place = first_difference(one.ids, other.ids)
    if place is not None:
        return [
            mismatch(
                id,
                start + place,
                one.ids[place : place + 1],
                other.ids[place : place + 1],
                ours,
                theirs,
                "the answers differ",
            )
        ]
    last = start + len(one.ids) - 1
    if one.finish != other.finish:
        return [
            mismatch(
                id,
                last,
                one.ids[-1:],
                other.ids[-1:],
                ours,
                theirs,
                f"the answer ended by {other.finish!r}, wanted {one.finish!r}: the stop token did not end it",
            )
        ]
    if one.text != other.text:
        return [
            mismatch(
                id,
                last,
                one.ids[-1:],
                other.ids[-1:],
                ours,
                theirs,
                f"the same tokens became the text {other.text[-60:]!r}, wanted {one.text[-60:]!r}",
            )
        ]
    return []


def compare_prompt(
    id: str, one: Answer, other: Answer, ours: ChatFormat, theirs: ChatFormat
) -> list[dict[str, Any]]:
    if other.fault:
        return [
            mismatch(
                id,
                len(other.prompt) + len(other.ids),
                [],
                [],
                ours,
                theirs,
                f"the gateway answered with a fault: {' '.join(other.fault.split())[:200]}",
            )
        ]
    place = first_difference(one.prompt, other.prompt)
    return (
        []
        if place is None
        else [
            mismatch(
                id,
                place,
                one.prompt[place : place + 1],
                other.prompt[place : place + 1],
                ours,
                theirs,
                "the prompts differ",
            )
        ]
    )


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where one ends and the other goes on counts as well."""
    if list(one) == list(other):
        return None
    return next(
        (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right),
        min(len(one), len(other)),
    )


def mismatch(
    id: str,
    position: int,
    wanted: Sequence[int],
    seen: Sequence[int],
    ours: ChatFormat,
    theirs: ChatFormat,
    what: str,
) -> dict[str, Any]:
    return {
        "row": id,
        "position": position,
        "wanted": _token(wanted, ours),
        "seen": _token(seen, theirs),
        "what": what,
    }


def _token(ids: Sequence[int], chat: ChatFormat) -> dict[str, Any] | None:
    """None: nothing stands there."""
    return (
        {"id": ids[0], "text": str(chat.tokenizer.decode(list(ids[:1]), skip_special_tokens=False))}
        if ids
        else None
    )


def make_part(name: str, rows: int, found: list[dict[str, Any]], reason: str) -> Part:
    if not found:
        return Part(name, rows, 0, reason)
    first = found[0]
    where = f"row {first['row']}, token {first['position']}: {_said(first['wanted'])} by the trainer, {_said(first['seen'])} by the other way"
    return Part(
        name,
        rows,
        len(found),
        f"{name}: {len(found)} of {rows} rows differ. First: {first['what']} ({where})",
        first,
    )


def _said(token: dict[str, Any] | None) -> str:
    return f"{token['text']!r} ({token['id']})" if token else "nothing"
