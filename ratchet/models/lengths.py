"""Choose the length limit of rows from the rows themselves, and refuse data with too many longer rows.

A candidate's manifest records the limit of its training, so that evaluation, parity, serving and export use
the number that `tokenize` chose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ratchet.config.data import PrepareConfig, TokenizeConfig
from ratchet.config.training import BaseConfig, kind_of_base
from ratchet.errors import DataError
from ratchet.models.chat_template import NO_MEDIA, ChatFormat
from ratchet.models.loading import load_chat
from ratchet.models.manifests import MANIFEST, read_base_manifest, read_trained_manifest

COVERED = 0.995  # share of the training rows that fit the limit chosen by `auto`
STEP = 64  # `auto` is a multiple of it: one more row rarely changes the number, and kernels are fast on it
WINDOW = 2048  # an automatic window holds two of the longest rows up to this many tokens


class Limits(NamedTuple):
    """The limits of rows and windows, in tokens."""

    max_length: int
    window: int


def choose_limits(
    lengths: Sequence[int], whole: Sequence[int], context: int | None, config: TokenizeConfig
) -> Limits:
    """Return the limits for training rows of these `lengths`, in tokens.

    `whole`: lengths of rows that have to fit in any case (golden rows, canaries). Raises DataError if a
    number in params.yaml is over the base's `context`.
    """
    most = min(context or math.inf, math.inf if config.window == "auto" else config.window)
    longest = config.max_length
    if longest == "auto":
        longest = int(min(most, max(length_for(lengths), *map(_rounded, whole), STEP)))
    window = config.window
    if window == "auto":
        window = int(max(longest, min(2 * longest, WINDOW, context or WINDOW)))
    for key, value in (("max_length", longest), ("window", window)):
        if context and value > context:
            raise DataError(
                f"`tokenize.{key}` is {value}, the base has {context} positions",
                remedy=f"set it to {context} or less, or to `auto`",
            )
    return Limits(longest, window)


def length_for(lengths: Sequence[int], longer: int | None = None) -> int:
    """Return the lowest multiple of 64 that at most `longer` rows exceed, by default 0.5 % of them."""
    if not lengths:
        return STEP
    longer = len(lengths) - math.ceil(COVERED * len(lengths)) if longer is None else longer
    return _rounded(sorted(lengths)[max(0, len(lengths) - 1 - longer)])


def _rounded(length: int) -> int:
    return math.ceil(length / STEP) * STEP


def check_dropped(
    what: str,
    rows: int,
    dropped: dict[str, int],
    lengths: Sequence[int],
    max_length: int,
    context: int | None,
    config: PrepareConfig,
    fault: str = "",
) -> None:
    """Raise DataError if more of `rows` are dropped than `prepare.max_rejected_share` allows.

    `what` names the rows in the message; `dropped` maps reasons to numbers of rows; `lengths` are those of
    all rows, in tokens; `fault` is the message of the first row that is dropped for another reason than its
    length.
    """
    lost, most = sum(dropped.values()), config.may_drop(rows)
    if lost <= most:
        return
    longer = most - (lost - dropped.get("too_long", 0))
    raise DataError(
        f"{lost} of {rows} {what} would be dropped ({dropped}); `tokenize.max_length` is "
        f"{max_length}, `prepare.max_rejected_share` {config.max_rejected_share:g}",
        remedy=length_remedy(length_for(lengths, longer), context)
        if longer >= 0
        else f"no length would do; the first of the others: {fault}",
    )


def check_whole(what: str, lengths: Sequence[int], longest: int, context: int | None) -> None:
    """Raise DataError for golden rows over `longest` tokens, because the gate needs every golden row."""
    if over := sum(length > longest for length in lengths):
        raise DataError(
            f"{over} of {len(lengths)} {what} have more than {longest} tokens, and every one has to be asked",
            remedy=length_remedy(length_for(lengths, 0), context),
        )


class Lengths(NamedTuple):
    """The lengths of rows that are not in a batch yet, in tokens of the chosen base."""

    rows: int
    median: int
    covered: int  # 99.5 % of the rows are no longer
    longest: int
    max_length: int  # the limit in params.yaml, or the one that `auto` would choose for these rows
    too_long: int  # rows over it


def known_tokens(
    base: Path, config: BaseConfig, media: Mapping[str, bytes] = NO_MEDIA
) -> tuple[ChatFormat | None, str]:
    """Return the chat format of the chosen base, or None and the reason in one line.

    `media` has the pictures of the rows to encode, by name.
    """
    if not (base / MANIFEST).exists():
        return None, "lengths in tokens are not known: models/base is not made yet (dvc repro code base)"
    manifest = read_base_manifest(base)
    # A folder, a file or a version is identified by the sha256 of its weights, not by its place.
    if kind_of_base(config.model) in ("demo", "hub"):
        chosen = (manifest.model, manifest.revision) == (config.model, config.revision)
    else:
        chosen = str(manifest.model).startswith("sha256:")
    if not chosen:
        return None, f"lengths in tokens are not known: models/base is {manifest.model}, not `base.model`"
    chat = load_chat(base, media)
    if bool(chat.reasoning) != (config.reasoning == "learn"):
        return (
            None,
            "lengths in tokens are not known: models/base has another `base.reasoning` (dvc repro base)",
        )
    return chat, ""


def describe_lengths(lengths: Sequence[int], context: int | None, config: TokenizeConfig) -> Lengths:
    """Compare rows with the limit that would apply to them. Raises DataError as `choose_limits` does."""
    limit, ranked = choose_limits(lengths, [], context, config).max_length, sorted(lengths)
    return Lengths(
        len(ranked),
        ranked[len(ranked) // 2],
        ranked[math.ceil(COVERED * len(ranked)) - 1],
        ranked[-1],
        limit,
        sum(length > limit for length in ranked),
    )


def length_remedy(length: int, context: int | None) -> str:
    """Return the advice for rows of `length`: the setting to use, or a base with a longer context."""
    if context and length > context:
        return f"shorten them, or take a base with a longer context: this one has {context} positions"
    return f"`tokenize.max_length: {length}` would do, or `auto`; then `tokenize.window` is as much or `auto`"


def trained_length(candidate: Path, base: Path) -> int:
    """Return the longest row, in tokens, that a candidate was trained for.

    For versions of older releases, which do not record it, it is the base's context.
    """
    return read_trained_manifest(candidate).max_length or read_base_manifest(base).context or 0
