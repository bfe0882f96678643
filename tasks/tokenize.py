"""Prepared rows to packed windows of token ids with the loss mask.

    python -m tasks.tokenize --prepared data/prepared --base models/base --incumbent models/incumbent --out data/tokenized

Chooses the rows to train on (what the champion has not seen plus a replayed share, or all), encodes them through
`ratchet.models.chat_template`, rejects what does not fit and says so. Validation is always whole.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from ratchet.config.params import Config
from ratchet.data.canaries import make_canaries
from ratchet.data.examples import Example, encode_line, read_examples
from ratchet.data.mixture import is_feedback, limit_feedback
from ratchet.errors import DataError
from ratchet.files import read_json, sha256_file, whole_folder, write_bytes, write_json
from ratchet.models.chat_template import ChatFormat, Encoded
from ratchet.models.loading import MANIFEST, load_tokenizer
from ratchet.pipeline.stage import run_stage, say
from ratchet.training.packing import IGNORED, Window, pack, write_windows


def tokenize(prepared: Path, base: Path, incumbent: Path, out: Path, config: Config) -> dict[str, Any]:
    """Returns the profile. Raises DataError: nothing left to train on, a window longer than the base's context."""
    context = read_json(base / MANIFEST)["context"]
    if config.tokenize.window > context:
        raise DataError(
            f"`tokenize.window` is {config.tokenize.window}, the base has {context} positions",
            remedy=f"set it to {context} or less",
        )
    chat = ChatFormat(load_tokenizer(base))
    seen = set(read_json(incumbent / MANIFEST)["batches"])
    rows = list(read_examples(prepared / "train.jsonl"))
    wanted = choose_rows(rows, seen, config)
    chosen = limit_feedback(rows, wanted, config.train.max_feedback_share)
    profile: dict[str, Any] = {
        "window": config.tokenize.window,
        "rejected": [],
        "feedback": _count_feedback(wanted, chosen),
    }
    with whole_folder(out) as folder:
        for split, examples in (
            ("train", chosen),
            ("validation", list(read_examples(prepared / "validation.jsonl"))),
        ):
            fitting = []
            for example in examples:
                row = chat.encode(example)
                if reason := _unfit(chat, example, len(row.ids), config.tokenize.max_length):
                    profile["rejected"].append(
                        {
                            "id": example.id,
                            "batch": example.meta["batch"],
                            "split": split,
                            "reason": reason[0],
                            "message": reason[1],
                        }
                    )
                else:
                    fitting.append((example, row))
            planted = _plant(chat, config) if split == "train" else []
            windows = pack([*(row for _, row in fitting), *planted], config.tokenize.window)
            write_windows(folder / f"{split}.arrow", windows)
            profile[split] = _describe([example for example, _ in fitting], windows, seen)
        write_bytes(folder / "rejected.jsonl", map(encode_line, profile["rejected"]))
        write_bytes(folder / "rows.txt", [f"{example.id}\n".encode() for example in chosen])
        if config.evaluate.canaries:
            profile["canaries"] = config.evaluate.canaries
            write_bytes(
                folder / "canaries.jsonl",
                [encode_line(canary.row()) for canary in make_canaries(config.evaluate.canaries)],
            )
        profile["rejected"] = dict(Counter(row["split"] for row in profile["rejected"]))
        profile["batches"] = sorted({str(example.meta["batch"]) for example in chosen})
        profile["sha256"] = {
            split: sha256_file(folder / f"{split}.arrow") for split in ("train", "validation")
        }
        write_json(folder / "profile.json", profile)
    if not profile["train"]["rows"]:
        raise DataError(
            "no row is left to train on",
            remedy="`tokenize.max_length` may be too small for these rows, or the champion has seen every batch and `train.replay` is 0, or there is nothing but people's feedback (`train.max_feedback_share`)",
        )
    return profile


def _plant(chat: ChatFormat, config: Config) -> list[Encoded]:
    """Canaries for the leak test: trained on, but counted among no rows."""
    planted = [chat.encode(canary.row()) for canary in make_canaries(config.evaluate.canaries)]
    if (longest := max((len(row.ids) for row in planted), default=0)) > config.tokenize.max_length:
        raise DataError(
            f"a canary has {longest} tokens with the template, `tokenize.max_length` is {config.tokenize.max_length}",
            remedy="raise it, or set `evaluate.canaries: 0`",
        )
    return planted


def choose_rows(rows: list[Example], seen: set[str], config: Config) -> list[Example]:
    """Rows of new batches, and of the old ones the replayed share: those with the smallest ids, so that the choice is stable."""
    if config.train.rows == "all" or config.train.start_from == "base":
        return rows
    old = sorted((row for row in rows if row.meta["batch"] in seen), key=lambda row: row.id[::-1])
    replayed = {row.id for row in old[: round(config.train.replay * len(old))]}
    return [row for row in rows if row.meta["batch"] not in seen or row.id in replayed]


def _count_feedback(wanted: list[Example], chosen: list[Example]) -> dict[str, int]:
    asked, taken = (sum(is_feedback(row.meta) for row in rows) for rows in (wanted, chosen))
    return {"rows": taken, "left_out": asked - taken}


def _unfit(chat: ChatFormat, example: Example, length: int, longest: int) -> tuple[str, str] | None:
    """Reason and message."""
    if length > longest:
        return "too_long", f"{length} tokens with the template; `tokenize.max_length` is {longest}"
    if header := chat.find_header(example.messages):
        return "role_header", f"a line begins with {header!r}, as the chat template begins a turn"
    return None


def _describe(examples: list[Example], windows: list[Window], seen: set[str]) -> dict[str, Any]:
    tokens = sum(len(window.input_ids) for window in windows)
    return {
        "rows": len(examples),
        "new": sum(example.meta["batch"] not in seen for example in examples),
        "replayed": sum(example.meta["batch"] in seen for example in examples),
        "windows": len(windows),
        "tokens": tokens,
        "learned_tokens": sum(label != IGNORED for window in windows for label in window.labels),
    }


def _main(config: Config, arguments: argparse.Namespace) -> None:
    profile = tokenize(arguments.prepared, arguments.base, arguments.incumbent, arguments.out, config)
    train, feedback = profile["train"], profile["feedback"]
    if feedback["left_out"]:
        say(
            f"tokenize: {feedback['rows']} rows of people's feedback; {feedback['left_out']} are over `train.max_feedback_share` and stay out"
        )
    if profile.get("canaries"):
        say(
            f"tokenize: {profile['canaries']} canaries planted on top of the training rows (`evaluate.canaries`)"
        )
    say(
        f"tokenize: {train['rows']} training rows ({train['new']} new, {train['replayed']} replayed) in {train['windows']} windows, {train['learned_tokens']} learned tokens; rejected {profile['rejected'] or 0}"
    )


if __name__ == "__main__":
    run_stage(__doc__, ["prepared", "base", "incumbent", "out"], _main)
