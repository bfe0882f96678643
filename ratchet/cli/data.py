"""`ratchet data`: the group, `erase` and `revert`; rows.py holds the commands that only read."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratchet.cli import rows
from ratchet.cli.context import Json, add_old_name, note, read_config, ready_root, say, show
from ratchet.errors import UserError

if TYPE_CHECKING:
    from ratchet.config.params import Config
    from ratchet.promotion.lineage import Trace

app = typer.Typer(
    help="Rows of data: check, show, resubmit, erase, revert.", no_args_is_help=True, rich_markup_mode=None
)
rows.add_to(app)
SHOWN = 20  # places that are printed; --json lists all
ID = re.compile(r"[0-9a-f]{32}")


@app.command("erase")
def erase(
    match: Annotated[
        str, typer.Option("--match", metavar="REGEX", help="Rows in whose texts the pattern is found.")
    ] = "",
    example_id: Annotated[
        str,
        typer.Option(
            "--id", metavar="EXAMPLE_ID", help="The row with this id, 32 hex digits, and its copies."
        ),
    ] = "",
    user: Annotated[
        str,
        typer.Option(
            "--user",
            metavar="NAME",
            help="Rows whose `meta` names this person, or the pseudonym that the gateway gave them.",
        ),
    ] = "",
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in git, so write no names.")] = "by hand",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be erased, and change nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Keep rows out of all future trainings, mark the versions that learned from them, say how to purge.

    Example: ratchet data erase --match "Ana Meyer" --reason "ticket 12"
    """
    root = ready_root()
    query = _query(root, match, example_id, user)
    config = read_config(root)
    from flows.erase import erase_rows, find_rows, summary

    found = find_rows(root, config, query, note)
    places = [row.place for row in found]
    if dry_run:
        show({"found": places}, as_json, lambda: _tell_found(places))
        return
    if not yes:
        _tell_found(places, to=sys.stderr)
        typer.confirm("Erase these rows?", abort=True, err=True)
    done = erase_rows(root, config, found, reason=reason, say=note)

    def tell() -> None:
        if yes:
            _tell_found(places)
        say(
            f"{done.rows} rows are newly on the list, {len(found) - done.rows} were on it already; "
            f"commit {done.commit[:8]}. The next `ratchet retrain` does without them."
        )
        listed = "rows on the list"
        for line in [*_about_versions(root, config, done.versions, listed), *_about_bytes(root, found)]:
            say(line)

    show(summary(done, found), as_json, tell)


add_old_name(app, "data forget", "data erase", erase)


@app.command("revert")
def revert(
    batch: Annotated[str, typer.Argument(metavar="BATCH", help="A batch's name, or how it begins.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in git.")] = "by hand",
    as_json: Json = False,
) -> None:
    """Take a batch back by a new commit; the batches after it stay. Mark the versions that learned from it.

    Example: ratchet data revert 20260301T --reason "wrong prices"
    """
    root = ready_root()
    config = read_config(root)
    from flows.erase import revert_batch

    done = revert_batch(root, config, batch, reason=reason, say=note)
    versions = None if done.versions is None else [entry._asdict() for entry in done.versions]
    found = {"batch": done.batch, "golden": done.golden, "commit": done.commit, "versions": versions}

    def tell() -> None:
        say(
            f"{done.batch.name} is taken back: {done.batch.rows} rows, commit {done.commit[:8]}. "
            "The next `ratchet retrain` neither trains on them nor replays them."
        )
        if done.golden:
            say(
                f"{done.golden} golden rows are rows of this batch too, and stay: a yardstick that moves "
                "measures nothing. To leave them out as well: ratchet data erase --id ID"
            )
        if done.batch.source in ("feedback", "review"):
            say(
                f"They came from the source {done.batch.source}: what people judged there may come again "
                "with the next ingest. For good: ratchet data erase"
            )
        for line in _about_versions(root, config, done.versions, "this batch", tag="reverted"):
            say(line)

    show(found, as_json, tell)


def _query(root: Path, match: str, example_id: str, user: str) -> Any:
    from ratchet.gateway.identity import known_pseudonym
    from tasks.erase import Query

    if sum(map(bool, (match, example_id, user))) != 1:
        given = [
            name for name, value in (("--match", match), ("--id", example_id), ("--user", user)) if value
        ]
        raise UserError(
            f"got {' and '.join(given) or 'no selection'}; wanted exactly one of --match, --id, --user",
            remedy="ratchet data erase --help",
        )
    if example_id and not ID.fullmatch(example_id):
        raise UserError(
            f"--id is {example_id[:60]!r}; wanted the id of an example, 32 hex digits",
            remedy="the lines of data/prepared/train.jsonl hold the ids",
        )
    if user:
        return Query(names=frozenset({user, known_pseudonym(root, user)} - {""}))
    try:
        return Query(
            pattern=re.compile(unicodedata.normalize("NFC", match)) if match else None, id=example_id
        )
    except re.error as error:
        raise UserError(f"--match is {match[:60]!r}, which is no regular expression: {error}") from None


def _tell_found(places: list[str], to: Any = None) -> None:
    more = (
        f"\n  … and {len(places) - SHOWN} more (--json --dry-run lists them)" if len(places) > SHOWN else ""
    )
    typer.echo(
        f"{len(places)} rows (batch:line):\n" + "\n".join(f"  {place}" for place in places[:SHOWN]) + more,
        file=to,
    )


def _about_versions(
    root: Path, config: Config, versions: list[Trace] | None, what: str, tag: str = "forget"
) -> Iterator[str]:
    from ratchet.promotion.champion import read_champion

    if versions is None:
        yield f"MLflow did not answer: the next `ratchet retrain` marks versions that learned from {what}."
        return
    if not versions:
        yield f"No registered version learned from {what}."
        return
    yield f"Versions that learned from {what}, each marked with the tag `{tag}`:"
    for version in versions:
        learned = (
            f"{version.rows} rows were in its training split"
            if version.exact
            else f"its batch was used ({version.rows} rows); its data can no longer be read"
        )
        yield f"  v{version.version}: " + "; ".join(
            [
                *([learned] if version.rows else []),
                *([f"continued from the weights of v{version.parent}"] if version.parent else []),
            ]
        )
    champion = read_champion(root)
    if champion and champion.version in {version.version for version in versions}:
        yield (
            f"v{champion.version} is in charge and has learned from these rows "
            "until another version takes its place."
        )
        if config.train.start_from == "champion":
            yield (
                "`train.start_from` is `champion`: the next version would continue from those weights. "
                "Set it to `base` for one retraining."
            )


def _about_bytes(root: Path, found: list[Any]) -> Iterator[str]:
    """Yield the commands that purge the rows' bytes: sed deletes them, dvc gc removes older copies."""
    from ratchet.data.batches import read_manifest
    from ratchet.data.erasure import GOLDEN
    from ratchet.pipeline.dvc import configured_remote

    lines: dict[str, list[int]] = {}
    for row in found:
        lines.setdefault(row.batch, []).append(row.line)
    golden = lines.pop(GOLDEN, [])
    pictured = {batch.name for batch in read_manifest(root / "data/raw") if batch.media}
    yield (
        "The rows' bytes are still there: batches are immutable, and DVC's cache, its remote and git keep "
        "what was. To purge them (docs/erasure.md):"
    )
    for batch, numbers in lines.items():
        yield f"  sed '{_delete(numbers)}' data/raw/{batch} > .ratchet/kept.jsonl"
        shard, shown = f"data/raw/{batch.removesuffix('.jsonl')}.tar", batch in pictured
        if shown:  # the ingest takes from it only the pictures of the rows that are kept
            yield f"  cp {shard} .ratchet/kept.tar"
        yield (
            f"  dvc unprotect data/raw && rm data/raw/{batch}{f' {shard}' * shown}"
            f" && sed -i '/{batch}/d' data/raw/manifest.jsonl"
        )
        yield (
            "  dvc add data/raw && git commit -m 'Take out a batch' data/raw.dvc"
            " && ratchet ingest --path .ratchet/kept.jsonl; rm .ratchet/kept.*"
        )
    if golden:
        yield (
            f"  sed -i '{_delete(golden)}' data/golden.jsonl"
            " && git commit -m 'Take out golden rows' data/golden.jsonl"
        )
    yield "  ratchet retrain --reason erasure       # and let the new version take charge"
    cloud = " --cloud" if configured_remote(root) else ""
    yield (
        f"  dvc gc --workspace --force{cloud}        # drops the data and weights of every commit but this "
        "one"
    )
    if golden:
        yield (
            "  git filter-repo --invert-paths --path data/golden.jsonl"
            "        # on a fresh clone: rewrites every commit's id, the ledger's too"
        )


def _delete(numbers: list[int]) -> str:
    return ";".join(f"{number}d" for number in sorted(numbers))
