"""Set up, run and look: `init`, `up`, `down`, `serve`, `status`, `verify`, `clean`, `doctor` and others."""

from __future__ import annotations

from functools import partial
from glob import glob
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated

import typer

from ratchet.cli.context import Json, find_root, name_version, note, read_config, say, show
from ratchet.errors import ConfigError, UserError

keys = typer.Typer(help="The gateway's API keys.", no_args_is_help=True, rich_markup_mode=None)


storage = typer.Typer(
    help="Where the shared state is: the rollout, retrainings, review queue, request log and locks.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@storage.command("status")
def storage_status(*, as_json: Json = False) -> None:
    """Show where the state is, and how much there is. Example: ratchet storage status"""
    from tasks.storage import where

    root = find_root()
    found = where(root, read_config(root))
    lines = [f"  {name:12}{rows:>9,}" for name, rows in {"documents": found.documents, **found.rows}.items()]
    show(found, as_json, lambda: say("\n".join([f"the state is in {found.storage}", *lines])))


@storage.command("move")
def storage_move(
    to: Annotated[
        str,
        typer.Option("--to", help="postgresql+psycopg://USER@HOST/DATABASE without a password, or `files`."),
    ],
    *,
    as_json: Json = False,
) -> None:
    """Move the state into a PostgreSQL that gateways and workers share, or back into files.

    Example: ratchet storage move --to postgresql+psycopg://ratchet@db/claims
    """
    from tasks.storage import move_storage

    root = find_root()
    moved = move_storage(root, read_config(root), to, lambda line: typer.echo(line, err=True))
    done = (
        f"moved {moved.documents} documents and {sum(moved.rows.values()):,} rows to {moved.target}\n"
        "storage.url in params.yaml is set: git commit it, and git pull it on the other machines"
    )
    show(moved, as_json, lambda: say(done))


@keys.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    scopes: Annotated[str, typer.Option(help="infer, feedback, admin, with commas.")] = "infer,feedback",
) -> None:
    """Make a key and show it, once. Example: ratchet keys add website"""
    from ratchet.gateway.auth import add_key

    say(add_key(find_root(), name, scopes.split(",")))


@keys.command("list")
def keys_list() -> None:
    """List names and scopes. Example: ratchet keys list"""
    from ratchet.gateway.auth import list_keys

    for key in list_keys(find_root()):
        say(f"{key.name:20} {','.join(key.scopes)}")


@keys.command("revoke")
def keys_revoke(name: Annotated[str, typer.Argument(help="Whose key it is.")]) -> None:
    """Refuse a key from now on. Example: ratchet keys revoke website"""
    from ratchet.gateway.auth import revoke_key

    revoke_key(find_root(), name)
    say(f"the key of {name} is refused from now on")


def init(
    base: Annotated[
        str | None, typer.Option(help="The base: `demo`, a folder, a GGUF file, a URL, or `org/name@COMMIT`.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="File, glob or URL of JSON Lines; `pydoc`: the embedded example.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="The score that the gate judges by.")] = None,
    gpu: Annotated[
        bool | None, typer.Option("--gpu/--no-gpu", help="Train on a GPU, on a base in 4 bits.")
    ] = None,
    promotion: Annotated[str | None, typer.Option(help="Who promotes: rollout, auto or manual.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a params.yaml that was changed.")] = False,
) -> None:
    """Ask five questions and write params.yaml; with one of the answers given it asks nothing.

    Example: ratchet init --data 'exports/*.jsonl' --promotion manual
    """
    from ratchet.config.setup import Answers, changes_for, write_params

    given = {"base": base, "data": data, "metric": metric, "gpu": gpu, "promotion": promotion}
    answers = Answers(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    if answers == Answers() and all(value is None for value in given.values()):
        answers = Answers(
            typer.prompt("Base model (`demo`, folder, GGUF file, URL, or org/name@COMMIT)", answers.base),
            typer.prompt("Rows (a file or glob of JSON Lines, or `pydoc`)", answers.data),
            typer.prompt("Metric of the gate", answers.metric),
            typer.confirm("Train on a GPU?", answers.gpu),
            typer.prompt("Who promotes (rollout, auto, manual)", answers.promotion),
        )
    path = find_root() / "params.yaml"
    write_params(path, answers, force=force)
    for key, value in changes_for(answers).items():
        say(f"{key}: {value}")
    is_here = answers.data != "pydoc" and "://" not in answers.data
    if is_here and not glob(answers.data, root_dir=path.parent):  # noqa: PTH207 (Path's takes no absolute one)
        say(f"{answers.data} matches no file yet; a relative path counts from {path.parent}")
    say(f"{path.name} is written; git commit it, then: ratchet doctor")


def params(
    section: Annotated[
        str | None, typer.Argument(help="One section whole, such as train; otherwise those often changed.")
    ] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Include those that few people change.")] = False,
    as_json: Json = False,
) -> None:
    """Show each setting: its value, its default where that differs, and where it was set.

    Example: ratchet params train
    """
    from ratchet.config.docs import yaml_value
    from ratchet.config.survey import read_settings

    found = read_settings(find_root() / "params.yaml", everything=everything or section is not None)
    if section:
        known = sorted({one.key.partition(".")[0] for one in found})
        found = [one for one in found if one.key.partition(".")[0] == section]
        if not found:
            raise UserError(f"params.yaml has no section {section}", remedy=f"take one of {', '.join(known)}")

    def tell() -> None:
        for one in found:
            other = "" if one.value == one.default else f"  (default {yaml_value(one.default)})"
            say(f"{one.key:36} {yaml_value(one.value)}{other}  {one.set_in or 'default'}")

    show([one._asdict() for one in found], as_json, tell)


def up() -> None:
    """Start MLflow, Prefect, the served deployments and the gateway, on 127.0.0.1.

    Example: ratchet up
    """
    from ratchet.services.supervisor import start_services

    root = find_root()
    for service in start_services(root, read_config(root), report=say):
        say(f"{service.name:12} {service.url or ''}")


def down(
    wait: Annotated[bool, typer.Option("--wait", help="Wait first until no run is under way.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Stop although a run is under way.")] = False,
) -> None:
    """Stop what `ratchet up` started here, unless a run is under way that needs it.

    Example: ratchet down --wait
    """
    from ratchet.services.specs import FEDERATION
    from ratchet.services.supervisor import NAMES, is_running, require_no_runs, stop_services

    root = find_root()
    if not force and any(is_running(root, name) for name in NAMES):
        require_no_runs(root, wait=wait, report=say)
    if not stop_services(root, report=say):
        say("nothing of this checkout runs")
    if is_running(root, FEDERATION):
        say("the link of the federation runs on: ratchet federate down")


def worker(
    pool: Annotated[str, typer.Option(help="The work pool, as `execution` in params.yaml names it.")],
) -> None:
    """Run stages for a retraining on another machine, one at a time, until Ctrl-C.

    Needs PREFECT_API_URL and MLFLOW_TRACKING_URI, unless both answer on this machine's loopback.

    Example: ratchet worker --pool gpu
    """
    import os
    import sys

    from ratchet.pipeline.checkout import check_checkout
    from ratchet.services.environment import prefect_api, service_environment

    root = find_root()
    config = read_config(root)
    check_checkout(root)
    environment = {**os.environ, **service_environment(root, config), "RATCHET_ROOT": str(root)}
    if "PREFECT_API_URL" not in environment:
        raise UserError(
            f"no Prefect server answers at {prefect_api(config.services.prefect_port)}",
            remedy="set PREFECT_API_URL to that of the machine that retrains (docs/second-machine.md)",
        )
    Path(environment["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    start = ["worker", "start", "--pool", pool, "--type", "process", "--limit", "1"]
    os.execve(sys.executable, [sys.executable, "-m", "prefect", *start], environment)  # noqa: S606


def serve() -> None:
    """Answer on OpenAI's protocol with the champion, until Ctrl-C. `ratchet up` does it in the background.

    Example: ratchet serve
    """
    from ratchet.gateway.server import serve as run

    root = find_root()
    run(root, read_config(root))


def status(
    everything: Annotated[
        bool, typer.Option("--all", help="Show all: every reason, topic, service and leftover.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show in fifteen lines who answers, what is wrong, what waits for a person, and what the gate said last.

    Example: ratchet status --all
    """
    root = find_root()
    config = read_config(root)

    from ratchet.services.status import see_status

    found = see_status(root, config)

    def tell() -> None:
        from ratchet.reporting.overview import describe_all, describe_in_short, look_around

        around = look_around(root, config, found)
        short = partial(describe_in_short, columns=get_terminal_size((100, 24)).columns)
        say("\n".join((describe_all if everything else short)(found, around)))

    show(found.to_json(), as_json, tell)


def verify(as_json: Json = False) -> None:
    """Check what must hold in every project: one champion everywhere, whole data, nothing left behind.

    It changes nothing, reads every byte of the data once, and ends with 1 if anything is wrong.

    Example: ratchet verify
    """
    from ratchet.services.environment import enter
    from ratchet.verification.project import verify as look

    root = find_root(mend=False)
    config = read_config(root)
    enter(root, config)
    findings = []
    for finding in look(root, config):
        findings.append(finding)
        if not as_json:
            say(finding.told)
    show(findings, as_json, lambda: None)
    if any(finding.result == "wrong" for finding in findings):
        raise typer.Exit(1)


def clean(
    apply: Annotated[bool, typer.Option("--apply", help="Remove what is listed.")] = False,
    as_json: Json = False,
) -> None:
    """List what this checkout can do without, with its size; with --apply remove it.

    Example: ratchet clean --apply
    """
    from ratchet.services.cleanup import find_leftovers, remove

    root = find_root()
    found = find_leftovers(root)
    for one in found if apply else []:
        remove(root, one)

    def tell() -> None:
        for one in found:
            say(f"{one.size / 2**20:10,.1f} MiB  {one.path.relative_to(root)} ({one.what})")
        total = f"{sum(one.size for one in found) / 2**20:,.1f} MiB"
        if not found:
            say("nothing to remove")
        else:
            say(f"{total} removed" if apply else f"{total} can go: ratchet clean --apply")

    show([{"path": str(one.path), "what": one.what, "bytes": one.size} for one in found], as_json, tell)


def backup(
    file: Annotated[Path, typer.Argument(help="The archive to write, a .tar.gz; it must not exist yet.")],
    whole: Annotated[
        bool, typer.Option("--whole", help="Pack the data that DVC's remote holds as well.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the whole project into one file: git, data, registry, request log, reviews. Services may run on.

    The file holds people's texts. It holds no secret: what is left out is printed.

    Example: ratchet backup ../claims-2026-03-01.tar.gz
    """
    from ratchet.backup.make import back_up

    root = find_root()
    made = back_up(root, read_config(root), file.absolute(), note, whole=whole)

    def tell() -> None:
        size = file.stat().st_size / 2**20
        say(f"{file}: {len(made.files)} files, {size:,.1f} MiB, commit {made.commit[:8]} of {made.branch}")
        _tell_gaps(made.left_out, made.missing)

    show(made, as_json, tell)


def restore(
    file: Annotated[Path, typer.Argument(help="An archive that `ratchet backup` wrote.")],
    into: Annotated[
        Path | None,
        typer.Option(help="An empty folder, or a new one; otherwise a new one of the project's name."),
    ] = None,
) -> None:
    """Restore a backup at any path. Every file is checked before anything is put in place.

    Example: ratchet restore claims-2026-03-01.tar.gz --into claims
    """
    from ratchet.backup.restore import restore as put_back

    place, made = put_back(file.absolute(), into.absolute() if into else None, note)
    champion = name_version(made.champion)
    say(f"{place}: {made.project} as of {made.at}, commit {made.commit[:8]}, {champion} in charge")
    _tell_gaps(made.left_out, made.missing)
    say(f"next: cd {place} && make install, then ratchet verify, then ratchet up")


def _tell_gaps(left_out: list[str], missing: list[str]) -> None:
    for one in left_out:
        say(f"left out  {one}")
    for one in missing:
        say(f"MISSING   {one}")


def report(
    path: Annotated[
        Path | None, typer.Option("--out", help="Where to write the page; otherwise .ratchet/report.html.")
    ] = None,
) -> None:
    """Write one page with the champion, traffic, feedback, drift, rollout and ledger.

    Example: ratchet report --out report.html
    """
    from ratchet.reporting.dashboard import write_page

    root = find_root()
    say(str(write_page(root, read_config(root), path or root / ".ratchet/report.html")))


def doctor(as_json: Json = False) -> None:
    """Check versions, ports, disk, git, DVC and GPU, and say what to do.

    Example: ratchet doctor
    """
    from ratchet.services.doctor import examine

    try:
        root: Path | None = find_root()
    except ConfigError:
        root = None
    findings = examine(root, read_config(root) if root else None)
    marks = {True: "ok  ", False: "BAD ", None: "note"}

    def tell() -> None:
        for finding in findings:
            say(f"{marks[finding.ok]} {finding.name:12} {finding.found}")
            if finding.ok is not True and finding.remedy:
                say(f"     {'':12} → {finding.remedy}")

    show(
        [
            {"name": finding.name, "ok": finding.ok, "found": finding.found, "remedy": finding.remedy}
            for finding in findings
        ],
        as_json,
        tell,
    )
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(2)
