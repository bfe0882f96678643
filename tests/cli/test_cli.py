"""The command as people type it: one message and an exit code that says whose fault it is.

What a process alone can show (start, script, signals, tracebacks) is tested in one; all else in this one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Done, command, in_process, ratchet
from patience import scaled
from places import commit, make_repository, use_git_without_a_user, write_files
from typer.testing import CliRunner

from ratchet.cli.main import app
from ratchet.config.docs import SURVEYED, render_params
from ratchet.config.params import Config, load_config
from ratchet.pipeline.checkout import git, locked
from ratchet.promotion.champion import FILE, Champion, write_champion

ROOT = Path(__file__).parents[2]
COMMANDS = tuple(
    [
        "demo",
        "up",
        "down",
        "ingest",
        "synthesize",
        "export",
        "base",
        "plan",
        "changes",
        "sweep",
        "compare",
        "privacy",
        "retrain",
        "status",
        "verify",
        "clean",
        "backup",
        "restore",
        "serve",
        "worker",
        "monitor",
        "rollout",
        "keys",
        "storage",
        "data",
        "review",
        "gate",
        "federate",
        "retention",
        "report",
        "promote",
        "rollback",
        "history",
        "doctor",
        "init",
        "params",
    ]
)
GROUPS = {
    "rollout": ("look", "status", "pause", "resume", "abort"),
    "keys": ("add", "list", "revoke"),
    "storage": ("status", "move"),
    "data": ("check", "rejected", "resubmit", "show", "erase"),
    "gate": ("plan", "explain"),
    "federate": (
        "up",
        "down",
        "invite",
        "remove",
        "forget",
        "key",
        "join",
        "leave",
        "run",
        "take",
        "status",
    ),
    "review": ("status", "next", "collect", "accept", "reject", "edit", "undo", "export", "import"),
}
PARAMS = (
    "project:\n  name: small\nservices:\n  mlflow_port: 5907\n  prefect_port: 5908\ngateway:\n  port: 5909\n"
)


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch):
    use_git_without_a_user(monkeypatch)
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_", "RATCHET_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")


@pytest.fixture
def root(tmp_path) -> Path:
    return make_repository(tmp_path / "my checkout", {"params.yaml": PARAMS})


def refused(*arguments: str | Path, cwd: Path = ROOT) -> str:
    """The message of a user's fault: on stderr, exit code 2, no traceback, nothing on stdout."""
    return check_refused(ratchet(*arguments, cwd=cwd))


def check_refused(done: Done) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def crown(root: Path) -> None:
    gate = {
        "verdict": "promote",
        "rival": None,
        "metric": "exact_match",
        "mean": 0.2,
        "low": 0.1,
        "high": 0.3,
    }
    data = {"rows": 10, "batches": 1, "dvc": "d.dir"}
    write_champion(
        root,
        Champion(
            "small",
            1,
            None,
            "c" * 40,
            "key",
            "run",
            "sha",
            ["one.jsonl"],
            data,
            gate,
            "2026-01-02T03:04:05Z",
            "Ana",
            "first",
            "promote",
            None,
        ),
    )
    commit(root, "Promote small v1")


# --- help ---


def test_help_names_every_command_and_where_to_start():
    done = in_process("--help")
    assert done.returncode == 0
    assert "Start with: ratchet demo" in done.stdout
    listed = {
        line.split()[0]
        for line in done.stdout.partition("Commands:")[2].splitlines()
        if line.startswith("  ") and not line.startswith("   ")
    }
    assert listed == set(COMMANDS)


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in COMMANDS if name not in GROUPS),
        *(f"{group} {name}" for group, names in GROUPS.items() for name in names),
    ],
)
def test_every_command_has_help_with_an_example(name):
    done = CliRunner().invoke(app, [*name.split(), "-h"])
    assert done.exit_code == 0
    assert f"Example: ratchet {name}" in " ".join(done.stdout.split())
    assert done.stderr == ""


def test_a_command_that_is_none_is_refused():
    assert "No such command 'train'" in check_refused(in_process("train"))


def test_the_script_and_the_module_are_one(root):
    script = Path(sys.executable).with_name("ratchet")
    done = subprocess.run([script, "-C", root, "history"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, in_process("-C", root, "history").stdout)


@pytest.mark.parametrize("arguments", [("status",), ("history", "--json"), ("rollback",)])
def test_a_process_says_what_the_other_tests_ask_without_one(root, arguments):
    crown(root)
    assert in_process("-C", root, *arguments) == ratchet("-C", root, *arguments)


@pytest.mark.parametrize(
    ("old", "new"),
    [("ledger", "retention"), ("data replay", "data resubmit"), ("data forget --match x", "data erase")],
)
def test_an_old_name_works_and_says_the_new_one(root, old, new):
    done, again = ratchet("-C", root, *old.split()), ratchet("-C", root, *new.split(), *old.split()[2:])
    note, _, rest = done.stderr.partition("\n")
    assert f"`ratchet {new}`" in note
    assert (done.returncode, done.stdout, rest) == (again.returncode, again.stdout, again.stderr)


def test_init_with_flags_asks_nothing_and_params_tells_where_a_value_was_set(tmp_path):
    (tmp_path / "params.yaml").write_text("train:\n  epochs: 9.0\n")
    flags = ("--data", "rows.jsonl", "--metric", "numeric_match", "--promotion", "manual")
    assert "--force" in refused("-C", tmp_path, "init", *flags)
    done = ratchet("-C", tmp_path, "init", *flags, "--force")
    assert done.returncode == 0 and "rows.jsonl matches no file yet" in done.stdout
    with (tmp_path / "params.yaml").open("a") as file:
        file.write("sweep:\n  seed: 3\n")
    shown = {one["key"]: one for one in json.loads(ratchet("-C", tmp_path, "params", "--json").stdout)}
    assert shown["promotion"] == {
        "key": "promotion",
        "value": "manual",
        "default": "rollout",
        "set_in": "params.yaml",
    }
    assert shown["sweep.seed"]["value"] == 3 and shown["train.epochs"]["value"] == 3.0
    every = {
        one["key"]: one for one in json.loads(ratchet("-C", tmp_path, "params", "--all", "--json").stdout)
    }
    assert len(every) > 200 and every["monitor.topics"]["set_in"] == ""
    assert "numeric_match" in ratchet("-C", tmp_path, "params").stdout
    section = json.loads(ratchet("-C", tmp_path, "params", "federate", "--json").stdout)
    assert {one["key"].partition(".")[0] for one in section} == {"federate"} and len(section) > 10
    assert "has no section federation" in ratchet("-C", tmp_path, "params", "federation").stderr


def test_init_without_flags_asks_five_questions(tmp_path):
    (tmp_path / "params.yaml").write_text(render_params(Config(), SURVEYED))
    answers = "demo\nexports/*.jsonl\nexact_match\nn\nauto\n"
    asked = subprocess.run(
        command("-C", tmp_path, "init"), input=answers, capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = load_config(tmp_path / "params.yaml")
    assert (found.ingest.jsonl.path, found.promotion) == ("exports/*.jsonl", "auto"), asked.stdout


def test_a_demo_on_an_unknown_base_is_refused_with_those_that_there_are():
    assert "`smollm2`" in refused("demo", "--base", "gpt-9")


# --- where it works ---


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert f"{tmp_path / 'none'} is no folder" in refused("-C", tmp_path / "none", "status")


def test_without_params_the_command_says_where_it_looked(tmp_path):
    assert f"no params.yaml in {tmp_path} or above" in refused("status", cwd=tmp_path)
    assert f"no params.yaml in {tmp_path}\n" in refused("-C", tmp_path, "status")


def test_the_checkout_is_found_from_a_folder_inside_it(root):
    (root / "docs" / "deep").mkdir(parents=True)
    done = ratchet("status", "--json", cwd=root / "docs" / "deep")
    assert json.loads(done.stdout)["project"] == "small"


@pytest.mark.parametrize("name", ["status", "retrain"])
def test_an_unknown_key_is_named_with_its_value(root, name):
    write_files(root, {"params.yaml": "train:\n  learning_rat: 0.1\n"})
    message = refused("-C", root, name)
    assert "train.learning_rat: unknown key (value 0.1)" in message
    assert "learning_rate" in message


def test_every_fault_of_the_params_is_told_at_once(root):
    write_files(root, {"params.yaml": "train:\n  epochs: -1\ngate:\n  alpha: 2\n"})
    message = refused("-C", root, "status")
    assert "has 2 fault(s)" in message
    assert "train.epochs" in message
    assert "gate.alpha" in message


def test_a_traceback_is_shown_when_it_is_asked_for(root):
    write_files(root, {"params.yaml": "train: 5\n"})
    done = in_process("--debug", "-C", root, "status")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


WORKING = [("ingest",), ("retrain",), ("promote", "1"), ("rollback",)]


@pytest.mark.parametrize("arguments", WORKING, ids=lambda arguments: arguments[0])
def test_a_checkout_with_uncommitted_changes_is_refused_before_any_work(root, arguments):
    write_files(root, {".gitignore": "other\n"})
    assert "has uncommitted changes: .gitignore" in refused("-C", root, *arguments)
    assert not (root / ".ratchet").exists()


def test_a_folder_without_git_is_refused(tmp_path):
    write_files(tmp_path, {"params.yaml": PARAMS})
    assert "is no git repository" in refused("-C", tmp_path, "retrain")


# --- what it says ---


def test_the_status_of_a_fresh_checkout_says_what_to_do_next(root, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it in the process of other tests
    done, short = ratchet("-C", root, "status", "--all"), ratchet("-C", root, "status")
    assert done.returncode == short.returncode == 0
    assert "ratchet ingest" in short.stdout and "ratchet up" in short.stdout
    assert len(short.stdout.splitlines()) < 15 and short.stdout.endswith("ratchet status --all\n")
    for words in (
        "project    small (promotion: rollout)",
        "champion   none yet",
        "ratchet ingest",
        "mlflow     not running: ratchet up",
        "prefect    not running: ratchet up",
    ):
        assert words in done.stdout
    assert done.stderr == short.stderr == ""


def test_status_and_history_are_json_on_request(root):
    crown(root)
    (root / ".ratchet/workspaces/20260101T000000-retrain-1-failed").mkdir(parents=True)
    write_files(
        root,
        {
            "reports/gate.json": json.dumps(
                {
                    "verdict": "promote",
                    "reasons": ["better"],
                    "rival": {"model": "base", "version": None},
                    "checks": [],
                }
            )
        },
    )
    found = json.loads(ratchet("-C", root, "status", "--json").stdout)
    assert found["champion"] == {
        "version": 1,
        "since": "2026-01-02T03:04:05Z",
        "by": "Ana",
        "why": "first",
        "gate": found["champion"]["gate"],
    }
    assert found["gate"] == {
        "verdict": "promote",
        "reasons": ["better"],
        "rival": {"model": "base", "version": None},
    }
    assert found["left"] == ["20260101T000000-retrain-1-failed"]
    assert {name: service["answers"] for name, service in found["services"].items()} == {
        "mlflow": False,
        "prefect": False,
        "deployments": False,
        "gateway": False,
    }
    [row] = json.loads(ratchet("-C", root, "history", "--json").stdout)
    assert (row["move"], row["from"], row["to"], row["commit"]) == (
        "promote",
        None,
        1,
        git(root, "rev-parse", "HEAD").strip(),
    )
    text = ratchet("-C", root, "status", "--all").stdout
    assert "champion   v1 since 2026-01-02T03:04:05Z, by Ana: first" in text
    assert "last gate  promote, against the base" in text
    assert "left over  .ratchet/workspaces/20260101T000000-retrain-1-failed" in text


def test_the_history_of_a_fresh_checkout_is_empty(root):
    assert "no model was promoted yet" in ratchet("-C", root, "history").stdout
    assert json.loads(ratchet("-C", root, "history", "--json").stdout) == []


@pytest.mark.parametrize("name", ["status", "history"])
def test_a_champion_file_that_is_garbage_is_told_with_the_way_back(root, name):
    write_files(root, {FILE: "garbage"})
    commit(root, "Break it")
    assert "is no champion entry" in refused("-C", root, name)


def test_looking_loads_nothing_slow(root):
    """`status` and `history` answer at once."""
    crown(root)
    for name in ("status", "history"):
        program = (
            f"import sys; sys.argv = ['ratchet', '-C', {str(root)!r}, {name!r}]\nfrom ratchet.cli.main "
            "import main\ntry:\n    main()\nexcept SystemExit as end:\n    print(end.code)\n"
        )
        program += (
            "print(*sorted({name.split('.')[0] for name in sys.modules} & "
            "{'torch', 'mlflow', 'prefect', 'pandas', 'dvc', 'transformers'}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-2:] == ["0", ""]


# --- decisions ---


def test_without_a_champion_there_is_nothing_to_roll_back(root):
    assert "there is no champion to roll back from" in refused("-C", root, "rollback")


def test_to_overrule_the_gate_takes_a_reason(root):
    assert "--force without --reason" in refused("-C", root, "promote", "1", "--force")


@pytest.mark.parametrize("number", ["0", "-1", "one"])
def test_a_version_is_a_number_from_one(root, number):
    assert "Invalid value for 'version'" in refused("-C", root, "promote", "--", number)


def test_a_service_that_is_away_is_not_the_users_fault(root):
    done = ratchet("-C", root, "promote", "1")
    assert done.returncode == 1
    assert "ServiceError: MLflow at http://127.0.0.1:1" in done.stderr
    assert "`ratchet up` starts it" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_runs_so_there_is_nothing_to_stop(root):
    done = ratchet("-C", root, "down")
    assert (done.returncode, done.stdout) == (0, "nothing of this checkout runs\n")


# --- signals ---


IN_THE_BACKGROUND = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]  # a script's `command &` ignores SIGINT


@pytest.mark.parametrize(
    ("number", "before"),
    [(signal.SIGINT, []), (signal.SIGTERM, []), (signal.SIGTERM, IN_THE_BACKGROUND)],
    ids=["SIGINT", "SIGTERM", "SIGTERM in a script's background"],
)
def test_an_interrupted_command_says_so_and_leaves_nothing(root, number, before):
    """It waits for the lock of another command when the signal comes."""
    crown(root)
    log = root / ".ratchet" / "lock.log"
    program = (
        f"import logging; logging.basicConfig(filename={str(log)!r}); "
        "logging.getLogger('filelock').setLevel('DEBUG'); from ratchet.cli.main import main; main()"
    )
    with locked(root, "promote"):
        process = subprocess.Popen(
            [*before, sys.executable, "-c", program, "-C", str(root), "rollback"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (log.exists() and "waiting" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        output, message = process.communicate(timeout=scaled(20))
    assert process.returncode == 130
    assert output == ""
    assert message.startswith("interrupted") and message.count("\n") == 1
    assert not (root / ".ratchet" / "workspaces").exists()


def test_the_proof_of_a_base_is_shown_again(tmp_path: Path) -> None:
    findings = [{"name": "packing", "result": "adapted", "what": "rows are computed apart", "remedy": ""}]
    proof = json.dumps({"model": "tiny/model", "findings": findings})
    write_files(tmp_path, {"params.yaml": PARAMS})
    assert "no proof of the base" in refused("-C", tmp_path, "base")
    write_files(tmp_path, {"reports/base.json": proof})
    page = ratchet("-C", tmp_path, "base").stdout
    assert "tiny/model" in page and "packing" in page and "rows are computed apart" in page
    assert json.loads(ratchet("-C", tmp_path, "base", "--json").stdout)["findings"] == findings
