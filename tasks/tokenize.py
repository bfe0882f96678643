"""Turn prepared rows into packed windows of token ids with a loss mask.

    python -m tasks.tokenize --prepared data/prepared --base models/base --incumbent models/incumbent \\
        --out data/tokenized

Takes the rows that `ratchet.data.mixture` chooses, encodes them with `ratchet.models.chat_template`, and
rejects and counts rows that do not fit. Where the training learns from preferences (`train.objective`), rows
that are compared with each other share a window, each with its role. The whole validation split is used. Test
and golden rows are only measured, so that rows too long to be asked are reported before anything is trained.
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from ratchet.config.params import Config
from ratchet.data.examples import PEOPLE, Example, Meta, count_reasoned, encode_line, read_examples
from ratchet.data.mixture import Paired, mix_rows, pair_up, read_undesirable
from ratchet.errors import DataError, MediaError, UserError
from ratchet.evaluation.canaries import make_audit_canaries, make_canaries
from ratchet.files import read_json, sha256_file, whole_folder, write_bytes, write_json
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.models.chat_template import ChatFormat, Encoded, encode_last_answer
from ratchet.models.lengths import Limits, check_dropped, check_whole, choose_limits
from ratchet.models.loading import MANIFEST, load_chat
from ratchet.models.manifests import read_base_manifest
from ratchet.pipeline.stage import run_stage, say
from ratchet.training.packing import IGNORED, Role, Unit, Window, pack, pack_units, write_windows

LOOKED_AT = 64  # a mismatched answer is one of the LOOKED_AT - 1 answers that follow its prompt's own


class SplitFigures(msgspec.Struct, frozen=True):
    """Numbers for one split's encoded rows; `replayed` rows are of batches that the champion has seen."""

    rows: int
    new: int
    replayed: int
    windows: int
    tokens: int
    learned_tokens: int  # tokens that the loss counts


class FeedbackFigures(msgspec.Struct, frozen=True):
    rows: int
    left_out: int  # over `train.max_feedback_share`


class PreferenceFigures(msgspec.Struct, frozen=True):
    """Numbers of training rows by what is learned from them."""

    plain: int  # cross-entropy
    pairs: int
    desirable: int
    undesirable: int
    unpaired: int  # undesirable answers without a better one to their prompt: `dpo` cannot use them


class TokenProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `profile.json`; the keys that may be UNSET are omitted where they do not apply."""

    max_length: int  # tokens of a row; evaluation, parity and serving read it from the candidate's manifest
    window: int  # tokens
    rejected: dict[str, int]  # split → rows
    feedback: FeedbackFigures
    train: SplitFigures
    validation: SplitFigures
    batches: list[str]
    sha256: dict[str, str]  # split → hash of its file of windows
    canaries: int | msgspec.UnsetType = msgspec.UNSET
    audit_canaries: int | msgspec.UnsetType = msgspec.UNSET  # about half of them are planted
    preferences: PreferenceFigures | msgspec.UnsetType = msgspec.UNSET
    reasoned: int | msgspec.UnsetType = msgspec.UNSET  # training rows with reasoning
    reasoning: str | msgspec.UnsetType = msgspec.UNSET  # what the training does with it


class Unfit(msgspec.Struct, frozen=True):
    """A rejected row, as a line of `rejected.jsonl`."""

    id: str
    batch: str
    split: str
    reason: str
    message: str


class Measured(NamedTuple):
    """A row with its tokens, and the tokens of the same prompt with the worse answer."""

    example: Example
    tokens: Encoded
    worse: Encoded | None = None

    @property
    def length(self) -> int:
        return max(len(self.tokens.ids), len(self.worse.ids) if self.worse else 0)


def tokenize(prepared: Path, base: Path, incumbent: Path, out: Path, config: Config) -> TokenProfile:
    """Encode and pack training and validation rows into `out`.

    Raises DataError before anything is written: no row is left to train on, too many rows of a split are
    rejected, a golden row or a canary is too long (none may be missing), or a limit exceeds the context.
    """
    context = read_base_manifest(base).context
    media = MediaStore.read(prepared / MEDIA)
    chat = load_chat(base, media)
    seen = set(read_json(incumbent / MANIFEST)["batches"])
    compares = config.train.objective != "sft"
    mixture = mix_rows(_read(prepared, "train", compares=compares), seen, config.train)
    paired = _pair(mixture.rows, config)
    held_out = _pair(_read(prepared, "validation", compares=compares), config)
    rejected: list[Unfit] = []
    rows = {"train": paired.rows, "validation": held_out.rows} | {
        split: list(read_examples(prepared / f"{split}.jsonl")) for split in ("test", "golden")
    }
    splits = {
        split: _measure(
            chat,
            rows[split],
            config.train.objective if split in ("train", "validation") else "sft",
            split,
            rejected,
        )
        for split in rows
    }
    if golden := next((row for row in rejected if row.split == "golden"), None):
        raise DataError(
            f"the golden row {golden.id} cannot be written: {golden.message}",
            remedy="leave it out of data/golden.jsonl; every golden row has to be asked",
        )
    lengths = {split: [row.length for row in rows] for split, rows in splits.items()}
    champion = read_json(incumbent / MANIFEST).get("adapter_sha256", "")
    audited = make_audit_canaries(config.evaluate.audit_canaries, champion)
    canaries = [*make_canaries(config.evaluate.canaries), *(one for one, planted in audited if planted)]
    planted = [chat.encode(canary.row()) for canary in canaries]
    whole = [*lengths["golden"], *(len(row.ids) for row in planted)]
    limits = choose_limits(lengths["train"], whole, context, config.tokenize)
    check_whole("golden rows", lengths["golden"], limits.max_length, context)
    check_whole("planted canaries", [len(row.ids) for row in planted], limits.max_length, context)
    fitting = {
        split: list(_fitting(chat, splits[split], split, limits.max_length, rejected))
        for split in ("train", "validation", "test")
    }
    for split in fitting:
        unfit = [row for row in rejected if row.split == split]
        dropped = Counter(row.reason for row in unfit)
        check_dropped(
            f"{split} rows",
            len(fitting[split]) + dropped.total(),
            dict(dropped),
            lengths[split],
            limits.max_length,
            context,
            config.prepare,
            fault=next((row.message for row in unfit if row.reason != "too_long"), ""),
        )
    if not fitting["train"]:
        raise DataError(
            "no row is left to train on",
            remedy=f"`tokenize.max_length` ({limits.max_length}) may be too small for these rows, "
            "or the champion has seen every batch and `train.replay` is 0, "
            "or there is nothing but people's feedback (`train.max_feedback_share`)",
        )
    figures: dict[str, SplitFigures] = {}
    shown = set[str]()  # pictures of the windows, by name
    preferences = _count_preferences(fitting["train"], paired, config) if compares else msgspec.UNSET
    with whole_folder(out) as folder:
        for split, more in (("train", planted), ("validation", [])):
            windows = _pack(fitting[split], more, limits, config, owners=split == "train")
            write_windows(folder / f"{split}.arrow", windows)
            shown |= {name for window in windows for name in window.media}
            figures[split] = _describe([row.example for row in fitting[split]], windows, seen)
        _copy_shards(prepared / MEDIA, folder / MEDIA, shown)
        write_bytes(folder / "rejected.jsonl", map(encode_line, rejected))
        write_bytes(folder / "rows.txt", (f"{example.id}\n".encode() for example in mixture.rows))
        if canaries:
            write_bytes(folder / "canaries.jsonl", (encode_line(canary.row()) for canary in canaries))
        profile = TokenProfile(
            max_length=limits.max_length,
            window=limits.window,
            rejected=dict(Counter(row.split for row in rejected)),
            feedback=FeedbackFigures(mixture.feedback, mixture.left_out),
            train=figures["train"],
            validation=figures["validation"],
            batches=sorted({str(example.meta["batch"]) for example in mixture.rows}),
            sha256={split: sha256_file(folder / f"{split}.arrow") for split in figures},
            canaries=config.evaluate.canaries or msgspec.UNSET,
            audit_canaries=config.evaluate.audit_canaries or msgspec.UNSET,
            preferences=preferences,
            reasoned=(reasoned := count_reasoned(mixture.rows)) or msgspec.UNSET,
            reasoning=chat.told_reasoning if reasoned else msgspec.UNSET,
        )
        write_json(folder / "profile.json", msgspec.to_builtins(profile))
    return profile


def _copy_shards(source: Path, target: Path, names: set[str]) -> None:
    """Copy the shards that hold any of the pictures, so that a training needs no other folder."""
    if not names:
        return
    target.mkdir()
    for shard in sorted(source.glob("*.tar")):
        with tarfile.open(shard, "r:") as opened:
            held = not names.isdisjoint(opened.getnames())
        if held:
            shutil.copyfile(shard, target / shard.name)


def _read(prepared: Path, split: str, *, compares: bool) -> list[Example]:
    """Read a split, with the undesirable answers beside it where the training compares answers."""
    bad = read_undesirable(prepared, split) if compares else []
    return [*read_examples(prepared / f"{split}.jsonl"), *bad]


def _measure(
    chat: ChatFormat,
    examples: Iterable[Example],
    objective: str,
    split: str,
    rejected: list[Unfit],
) -> list[Measured]:
    """Encode rows; of rows that are compared, only the last answer is learned.

    Rows whose tools, calls, pictures or recordings the base cannot take are added to `rejected`.
    """
    found = []
    for example in examples:
        worse = None if objective == "sft" else example.worse
        try:
            encode = encode_last_answer if worse or objective == "kto" else ChatFormat.encode
            tokens = encode(chat, example)
            found.append(Measured(example, tokens, encode_last_answer(chat, worse) if worse else None))
        except UserError as error:
            reason = "media_base" if isinstance(error, MediaError) else "tool_call"
            fault = Unfit(example.id, str(example.meta["batch"]), split, reason, str(error))
            rejected.append(fault)
    return found


def _pair(rows: list[Example], config: Config) -> Paired:
    """Pair undesirable answers with better ones to the same prompt; only `dpo` learns from pairs."""
    if config.train.objective != "dpo":
        return Paired(rows, [])
    return pair_up([row for row in rows if row.desirable], [row for row in rows if not row.desirable])


def _count_preferences(rows: list[Measured], paired: Paired, config: Config) -> PreferenceFigures:
    """Count the training rows by role. Raises DataError when there is no preference to learn from."""
    worse, bad = sum(row.worse is not None for row in rows), sum(not row.example.desirable for row in rows)
    if not worse + bad:
        wanted = "a worse answer to the same prompt" if config.train.objective == "dpo" else "`label: false`"
        raise DataError(
            f"`train.objective` is {config.train.objective}, and none of {len(rows)} training rows has "
            f"{wanted} ({len(paired.unpaired)} bad answers have no better one)",
            remedy="ingest preferences (docs/data.md), or set `train.objective: sft`"
            + ("; `kto` learns from bad answers alone" if paired.unpaired else ""),
        )
    if config.train.objective == "dpo":
        return PreferenceFigures(len(rows) - worse, worse, 0, 0, len(paired.unpaired))
    return PreferenceFigures(0, 0, len(rows) - bad, bad + worse, 0)


def _pack(
    rows: list[Measured], planted: list[Encoded], limits: Limits, config: Config, *, owners: bool
) -> list[Window]:
    if config.train.objective == "sft":
        numbers = _number_users([row.example.meta for row in rows], len(planted)) if owners else []
        return pack([*(row.tokens for row in rows), *planted], limits.window, numbers)
    if config.train.objective == "dpo":
        units = [
            Unit([row.tokens, row.worse], [Role.CHOSEN, Role.REJECTED])
            if row.worse
            else Unit([row.tokens], [Role.PLAIN])
            for row in rows
        ]
    else:
        units = _judged_units(rows, limits.max_length)
    return pack_units([*units, *(Unit([row], [Role.PLAIN]) for row in planted)], limits.window)


def _number_users(metas: Sequence[Meta], more: int) -> list[int]:
    """Return a number for the user of each row, and others for `more` rows; none if no row names a user.

    A row that names nobody has a number of its own, as if it were a user's only one.
    """
    named = [next((f"user {meta[key]}" for key in PEOPLE if meta.get(key)), "") for meta in metas]
    if not any(named):
        return []
    names = [name or f"row {place}" for place, name in enumerate([*named, *[""] * more])]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


def _judged_units(rows: list[Measured], longest: int) -> list[Unit]:
    """Put beside each answer the same prompt with another row's answer, which gives KTO its reference point.

    The reference point is how far the model has moved in general (arXiv 2402.01306, section 4). Where no
    other answer fits, the answer itself is used.
    """
    answers: list[tuple[Encoded, Role]] = []
    for row in rows:
        role = Role.DESIRABLE if row.example.desirable else Role.UNDESIRABLE
        answers.append((row.tokens, role))
        if row.worse:
            answers.append((row.worse, Role.UNDESIRABLE))
    units = []
    for place, (answer, role) in enumerate(answers):
        others = (answers[(place + step) % len(answers)][0] for step in range(1, LOOKED_AT))
        swapped = (_swap(answer, other) for other in others)
        wrong = next((row for row in swapped if row.ids != answer.ids and len(row.ids) <= longest), answer)
        units.append(Unit([answer, wrong], [role, Role.MISMATCHED]))
    return units


def _swap(row: Encoded, other: Encoded) -> Encoded:
    """Return the prompt of `row` with the answer of `other`."""
    prompt, start = row.learned.index(True), other.learned.index(True)
    ids = [*row.ids[:prompt], *other.ids[start:]]
    return Encoded(ids, [place >= prompt for place in range(len(ids))], row.media)


def _fitting(
    chat: ChatFormat, rows: Iterable[Measured], split: str, longest: int, rejected: list[Unfit]
) -> Iterator[Measured]:
    """Yield the rows that fit, and add the others to `rejected`."""
    for row in rows:
        if reason := _find_fault(chat, row, split, longest):
            rejected.append(Unfit(row.example.id, str(row.example.meta["batch"]), split, *reason))
        else:
            yield row


def _find_fault(chat: ChatFormat, row: Measured, split: str, longest: int) -> tuple[str, str] | None:
    """Return (reason, message) for a row that cannot be learned, or a test row that cannot be asked."""
    if row.length > longest:
        return "too_long", f"{row.length} tokens with the template; `tokenize.max_length` is {longest}"
    if split != "test" and (header := chat.find_header(row.example.messages)):
        return "role_header", f"a line begins with {header!r}, as the chat template begins a turn"
    return None


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
            f"{feedback.left_out} are over `train.max_feedback_share` and are left out"
        )
    if profile.canaries:
        say(
            f"tokenize: {profile.canaries} canaries planted on top of the training rows (`evaluate.canaries`)"
        )
    chosen = " (auto)" if config.tokenize.max_length == "auto" else ""
    say(f"tokenize: rows of at most {profile.max_length} tokens{chosen} in windows of {profile.window}")
    if profile.preferences:
        found = {name: count for name, count in msgspec.to_builtins(profile.preferences).items() if count}
        say(
            f"tokenize: learned by {config.train.objective}: "
            + ", ".join(f"{count} {name}" for name, count in found.items())
        )
    elif bad := len(read_undesirable(arguments.prepared, "train")):
        say(f"tokenize: {bad} answers not to give are left out: `train.objective` is sft")
    if profile.reasoned:
        say(f"tokenize: {profile.reasoned} rows have reasoning; it is {profile.reasoning}")
    if not profile.validation.rows:
        say("tokenize: WARNING: there are no validation rows: the training could not be stopped early")
    say(
        f"tokenize: {train.rows} training rows ({train.new} new, {train.replayed} replayed) "
        f"in {train.windows} windows, {train.learned_tokens} learned tokens; rejected {profile.rejected or 0}"
    )


if __name__ == "__main__":
    run_stage(__doc__, ["prepared", "base", "incumbent", "out"], _main)
