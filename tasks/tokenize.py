"""Prepared rows to packed windows of token ids with the loss mask.

    python -m tasks.tokenize --prepared data/prepared --base models/base --incumbent models/incumbent \\
        --out data/tokenized

Takes the rows that `ratchet.data.mixture` chooses, encodes them through `ratchet.models.chat_template`,
rejects what does not fit and says so. Validation is always whole.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ratchet.config.params import Config
from ratchet.data.canaries import make_canaries
from ratchet.data.examples import Example, encode_line, read_examples
from ratchet.data.mixture import mix_rows
from ratchet.errors import DataError
from ratchet.files import read_json, sha256_file, whole_folder, write_bytes, write_json
from ratchet.models.chat_template import ChatFormat, Encoded
from ratchet.models.loading import MANIFEST, load_chat
from ratchet.pipeline.stage import run_stage, say
from ratchet.training.packing import IGNORED, Window, pack, write_windows


class SplitFigures(msgspec.Struct, frozen=True):
    """Rows of one split that were encoded; `new` and `replayed` count by the champion's batches."""

    rows: int
    new: int
    replayed: int
    windows: int
    tokens: int
    learned_tokens: int  # under the loss mask


class FeedbackFigures(msgspec.Struct, frozen=True):
    rows: int
    left_out: int  # over `train.max_feedback_share`


class TokenProfile(msgspec.Struct, frozen=True, kw_only=True):
    """What `profile.json` holds; `canaries` is left out where none is planted."""

    window: int
    rejected: dict[str, int]  # split → rows
    feedback: FeedbackFigures
    train: SplitFigures
    validation: SplitFigures
    batches: list[str]
    sha256: dict[str, str]  # split → of its windows
    canaries: int | msgspec.UnsetType = msgspec.UNSET


class Unfit(msgspec.Struct, frozen=True):
    """A row that was not encoded, as `rejected.jsonl` holds it."""

    id: str
    batch: str
    split: str
    reason: str
    message: str


def tokenize(prepared: Path, base: Path, incumbent: Path, out: Path, config: Config) -> TokenProfile:
    """Encode and pack both splits into `out`.

    Raises DataError: nothing is left to train on, a window is longer than the base's context.
    """
    context = read_json(base / MANIFEST)["context"]
    if config.tokenize.window > context:
        raise DataError(
            f"`tokenize.window` is {config.tokenize.window}, the base has {context} positions",
            remedy=f"set it to {context} or less",
        )
    chat = load_chat(base)
    seen = set(read_json(incumbent / MANIFEST)["batches"])
    mixture = mix_rows(list(read_examples(prepared / "train.jsonl")), seen, config.train)
    rejected: list[Unfit] = []
    figures: dict[str, SplitFigures] = {}
    with whole_folder(out) as folder:
        for split, examples, planted in (
            ("train", mixture.rows, _plant(chat, config)),
            ("validation", read_examples(prepared / "validation.jsonl"), []),
        ):
            fitting = _encode(chat, examples, split, config.tokenize.max_length, rejected)
            windows = pack([*(row for _, row in fitting), *planted], config.tokenize.window)
            write_windows(folder / f"{split}.arrow", windows)
            figures[split] = _describe([example for example, _ in fitting], windows, seen)
        write_bytes(folder / "rejected.jsonl", map(encode_line, rejected))
        write_bytes(folder / "rows.txt", (f"{example.id}\n".encode() for example in mixture.rows))
        if config.evaluate.canaries:
            canaries = make_canaries(config.evaluate.canaries)
            write_bytes(folder / "canaries.jsonl", (encode_line(canary.row()) for canary in canaries))
        profile = TokenProfile(
            window=config.tokenize.window,
            rejected=dict(Counter(row.split for row in rejected)),
            feedback=FeedbackFigures(mixture.feedback, mixture.left_out),
            train=figures["train"],
            validation=figures["validation"],
            batches=sorted({str(example.meta["batch"]) for example in mixture.rows}),
            sha256={split: sha256_file(folder / f"{split}.arrow") for split in figures},
            canaries=config.evaluate.canaries or msgspec.UNSET,
        )
        write_json(folder / "profile.json", msgspec.to_builtins(profile))
    if not profile.train.rows:
        raise DataError(
            "no row is left to train on",
            remedy="`tokenize.max_length` may be too small for these rows, "
            "or the champion has seen every batch and `train.replay` is 0, "
            "or there is nothing but people's feedback (`train.max_feedback_share`)",
        )
    return profile


def _encode(
    chat: ChatFormat, examples: Iterable[Example], split: str, longest: int, rejected: list[Unfit]
) -> list[tuple[Example, Encoded]]:
    """Encode the rows that fit; the others are added to `rejected`."""
    fitting = []
    for example in examples:
        row = chat.encode(example)
        if reason := _find_fault(chat, example, len(row.ids), longest):
            rejected.append(Unfit(example.id, str(example.meta["batch"]), split, *reason))
        else:
            fitting.append((example, row))
    return fitting


def _find_fault(chat: ChatFormat, example: Example, length: int, longest: int) -> tuple[str, str] | None:
    """Find (reason, message) of a row that cannot be learned."""
    if length > longest:
        return "too_long", f"{length} tokens with the template; `tokenize.max_length` is {longest}"
    if header := chat.find_header(example.messages):
        return "role_header", f"a line begins with {header!r}, as the chat template begins a turn"
    return None


def _plant(chat: ChatFormat, config: Config) -> list[Encoded]:
    """Encode canaries for the leak test: they are trained on, but counted among no rows."""
    planted = [chat.encode(canary.row()) for canary in make_canaries(config.evaluate.canaries)]
    if (longest := max((len(row.ids) for row in planted), default=0)) > config.tokenize.max_length:
        raise DataError(
            f"a canary has {longest} tokens with the template, "
            f"`tokenize.max_length` is {config.tokenize.max_length}",
            remedy="raise it, or set `evaluate.canaries: 0`",
        )
    return planted


def _describe(examples: list[Example], windows: list[Window], seen: set[str]) -> SplitFigures:
    replayed = sum(example.meta["batch"] in seen for example in examples)
    return SplitFigures(
        rows=len(examples),
        new=len(examples) - replayed,
        replayed=replayed,
        windows=len(windows),
        tokens=sum(len(window.input_ids) for window in windows),
        learned_tokens=sum(label != IGNORED for window in windows for label in window.labels),
    )


def _main(config: Config, arguments: argparse.Namespace) -> None:
    profile = tokenize(arguments.prepared, arguments.base, arguments.incumbent, arguments.out, config)
    train, feedback = profile.train, profile.feedback
    if feedback.left_out:
        say(
            f"tokenize: {feedback.rows} rows of people's feedback; "
            f"{feedback.left_out} are over `train.max_feedback_share` and stay out"
        )
    if profile.canaries:
        say(
            f"tokenize: {profile.canaries} canaries planted on top of the training rows (`evaluate.canaries`)"
        )
    say(
        f"tokenize: {train.rows} training rows ({train.new} new, {train.replayed} replayed) "
        f"in {train.windows} windows, {train.learned_tokens} learned tokens; rejected {profile.rejected or 0}"
    )


if __name__ == "__main__":
    run_stage(__doc__, ["prepared", "base", "incumbent", "out"], _main)
