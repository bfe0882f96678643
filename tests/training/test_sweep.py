"""A sweep's trials are real trainings that can be had again; what is bad ends early, what fails says why,
what was interrupted goes on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from patience import scaled
from places import KEPT_CONNECTIONS, commit, make_repository, use_mlflow, use_no_mlflow, write_files

from ratchet.config.docs import render_params
from ratchet.config.edit import diff_params, edit_params
from ratchet.config.params import Config, load_config
from ratchet.config.training import SweepRange, TrainConfig
from ratchet.errors import ConfigError, ServiceError
from ratchet.files import read_json, write_json
from ratchet.pipeline.checkout import child_environment
from ratchet.tracking.mlflow import mlflow_client
from ratchet.training.launch import Material
from ratchet.training.search_space import (
    changes_of,
    check_space,
    current,
    draw,
    dvc_command,
    rows_key,
    with_changes,
)
from ratchet.training.trials import STUDY_TAG, TRIAL_TAG, Best, TrialRecord, close_study, deliver
from tasks.sweep import DATABASE, TODAY, Search, propose
from tasks.train import train

ROOT = Path(__file__).parents[2]
HASH = "0123456789abcdef0123456789abcdef01234567"

pytestmark = pytest.mark.filterwarnings(KEPT_CONNECTIONS)


@pytest.fixture
def material(tokens: Path, tiny_base: Path, nobody: Path) -> Material:
    return Material(tokens, tiny_base, nobody)


def with_space(config: Config, space: dict[str, Any], **settings: Any) -> Config:
    return config.model_validate(
        {**config.model_dump(), "sweep": {"space": space, "trials": 3, "startup_trials": 1, **settings}}
    )


def search_in(home: Path, config: Config, material: Material, said: list[str] | None = None) -> Search:
    home.mkdir(exist_ok=True)
    return Search(home, config, material, commit=HASH, say=(said if said is not None else []).append)


def run_all(search: Search, material: Material) -> list[TrialRecord]:
    records = []
    while (trial := search.next()) is not None:
        records.append(search.run(trial, material))
    return records


def study_of(home: Path, search: Search) -> optuna.Study:
    return optuna.load_study(study_name=search.name, storage=f"sqlite:///{home / DATABASE}")


# --- the space ---


@pytest.mark.parametrize(
    ("space", "wanted"),
    [
        (
            {"train.learning_rat": [0.1]},
            "train.learning_rat: no key that can be searched; known: base.model, train.start_from",
        ),
        ({"gate.alpha": [0.1]}, "gate.alpha: no key that can be searched"),
        ({"train.preference_beta": [0.1, 0.3]}, "train.preference_beta: changes what the loss measures"),
        ({"adapter.rank": [8, 1000]}, "adapter.rank: Input should be less than or equal to 512, got 1000"),
        ({"train.epochs": {"low": -1, "high": 2}}, "train.epochs: Input should be greater than 0"),
        (
            {"adapter.method": {"low": 1, "high": 2}},
            "adapter.method: takes no range; wanted a list of choices",
        ),
        (
            {"train.batch_windows": {"low": 1, "high": 2.5}},
            "train.batch_windows: takes whole numbers, got 2.5",
        ),
        ({"adapter.method": ["lora", "lara"]}, "adapter.method: "),
        ({"base.model": ["org/name"]}, "base.model: "),
        ({}, "`sweep.space` is empty"),
    ],
)
def test_a_space_that_cannot_be_is_refused_with_its_key(space: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_space(with_space(Config(), space))
    assert wanted in " ".join(str(raised.value).split())


def test_every_fault_of_a_space_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 fault\(s\).*adapter\.rank.*train\.replay"):
        check_space(with_space(Config(), {"adapter.rank": [0], "train.replay": {"low": 0.5, "high": 2.0}}))


def test_the_space_that_params_yaml_comes_with_can_be_searched() -> None:
    check_space(Config())
    assert current(Config()) == {"train.learning_rate": 2.0e-4, "train.batch_windows": 4}


@pytest.mark.parametrize(
    ("choice", "model", "revision"),
    [
        ("./models-in/small", "./models-in/small", None),
        (f"./small@{'a' * 64}", "./small", "a" * 64),
        ("https://host/@ana/small", "https://host/@ana/small", None),
        ("v3", "v3", None),
    ],
)
def test_a_base_of_any_kind_can_be_a_choice(choice: str, model: str, revision: str | None) -> None:
    config = with_changes(Config(), changes_of({"base.model": choice}))
    assert (config.base.model, config.base.revision) == (model, revision)


def test_what_is_drawn_has_the_types_and_bounds_of_the_space(tmp_path: Path) -> None:
    space = {
        "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "adapter.rank": {"low": 8, "high": 64, "step": 8},
        "train.replay": {"low": 0.0, "high": 1.0, "step": 0.25},
        "adapter.target_modules": ["all-linear", ["q_proj", "v_proj"]],
        "train.checkpoint_activations": [True, False],
        "base.model": ["demo", f"org/name@{HASH}"],
    }
    config = with_space(Config(), space)
    check_space(config)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    drawn = [draw(study.ask(), config) for _ in range(40)]
    assert all(
        1e-4 <= one["train.learning_rate"] <= 1e-2
        and len(f"{one['train.learning_rate']:.9g}".lstrip("0.")) <= 6
        for one in drawn
    )
    assert {type(one["adapter.rank"]) for one in drawn} == {int} and {
        one["adapter.rank"] % 8 for one in drawn
    } == {0}
    assert {one["train.replay"] for one in drawn} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert next(
        one["adapter.target_modules"] for one in drawn if isinstance(one["adapter.target_modules"], list)
    ) == ["q_proj", "v_proj"]
    configs = [with_changes(config, changes_of(one)) for one in drawn]
    assert {(one.base.model, one.base.revision) for one in configs} == {("demo", None), ("org/name", HASH)}
    assert rows_key(changes_of(drawn[0])).keys() == {"train.replay", "base.model", "base.revision"}


# --- trials ---


def test_a_trial_is_the_training_that_its_params_say(
    material: Material, tiny_config: Config, tmp_path: Path
) -> None:
    config = with_space(
        tiny_config,
        {"train.learning_rate": {"low": 1e-3, "high": 3e-2, "log": True}, "adapter.rank": [2, 4]},
        trials=2,
    )
    search = search_in(tmp_path / "home", config, material)
    records = run_all(search, material)
    assert [record.state for record in records] == ["complete", "complete"]
    assert records[0].changes == {"train.learning_rate": 1e-2, "adapter.rank": 4}, (
        "today's settings come first"
    )
    again = with_changes(config, records[1].changes)
    figures = train(*material, tmp_path / "again/candidate", tmp_path / "again/reports", again)
    assert figures["best_validation_loss"] == records[1].value == records[1].figures["best_validation_loss"]
    assert figures["run_key"] == records[1].manifest["run_key"], "the key of data, params and code"
    assert search.best().value == min(record.value for record in records)
    assert search.baseline() == records[0].value
    assert [path.name for path in search.folder.iterdir() if path.is_dir()] == [], (
        "weights of trials are not kept"
    )


@pytest.mark.e2e
def test_a_bad_trial_ends_early_a_diverging_one_says_why_and_the_sweep_goes_on(
    material: Material, tiny_config: Config, tmp_path: Path
) -> None:
    patient = tiny_config.model_copy(
        update={
            "train": TrainConfig(
                epochs=6, evaluations=12, patience=99, learning_rate=1e-2, schedule="constant"
            )
        }
    )
    config = with_space(patient, {"train.learning_rate": [1e-2, 1e-9, 1e30]}, trials=3)
    home = tmp_path / "home"
    search = search_in(home, config, material)
    study = study_of(home, search)
    for rate in (1e-9, 1e30):
        study.enqueue_trial({"train.learning_rate": rate})
    good, bad, wild = run_all(search, material)
    assert (good.state, bad.state, wild.state) == ("complete", "pruned", "fail")
    made, wanted = bad.points[-1]["step"], good.figures["steps"]
    assert made < wanted, "its process ended before its training did"
    assert "worse than the median" in bad.reason
    assert wild.reason.startswith("DivergenceError: ")
    assert search.next() is None and search.counts() == {"complete": 1, "pruned": 1, "fail": 1, "running": 0}
    assert search.best().changes == {"train.learning_rate": 1e-2}


def test_a_combination_that_the_config_refuses_is_a_failed_trial(
    material: Material, tiny_config: Config, tmp_path: Path
) -> None:
    config = with_space(tiny_config, {"adapter.method": ["prefix"], "adapter.bias": ["all"]}, trials=1)
    search = search_in(tmp_path / "home", config, material)
    [record] = run_all(search, material)
    assert record.state == "fail" and "adapter.bias is 'all'" in record.reason and search.best() is None


@pytest.mark.e2e
def test_an_interrupted_sweep_goes_on_with_the_same_study(
    material: Material, tiny_config: Config, tmp_path: Path
) -> None:
    """Killed by -9 in the middle of a trial, as a process of its own; the settings of the lost trial are
    tried again, and the number of trials stays."""
    slow = tiny_config.model_copy(
        update={"train": TrainConfig(epochs=200, evaluations=4, learning_rate=1e-2)}
    )
    home, config = tmp_path / "home", with_space(slow, {"adapter.rank": [4, 8]}, trials=2)
    home.mkdir()
    (home / "params.yaml").write_text(render_params(config))
    program = (
        "import sys\nfrom pathlib import Path\nfrom ratchet.config.params import load_config\n"
        "from ratchet.training.launch import Material\nfrom tasks.sweep import Search\n"
        "home = Path(sys.argv[1]); material = Material(*map(Path, sys.argv[2:]))\n"
        "search = Search(home, load_config(home / 'params.yaml'), material, commit='c', say=print)\n"
        "search.run(search.next(), material)\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program, str(home), *map(str, material)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + scaled(60)
    while not trainings_in(home) and time.monotonic() < until and started.poll() is None:
        time.sleep(0.05)
    assert trainings_in(home), "its training has begun"
    [child] = psutil.Process(started.pid).children()
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE, "its training goes on without it"

    said: list[str] = []
    search = search_in(home, config, material, said)
    assert any("trial 0 was lost with its process" in line for line in said)
    trial = search.next()
    assert trial is not None and trial.user_attrs["changes"] == {"adapter.rank": 4}
    with pytest.raises(KeyboardInterrupt):
        interrupt(search, trial, material)
    again = search_in(home, config, material).next()
    assert again is not None and again.user_attrs["changes"] == {"adapter.rank": 4}
    assert search.counts() == {"complete": 0, "pruned": 0, "fail": 0, "running": 1}, (
        "what was lost or put back is no trial"
    )
    assert len(list((home / ".ratchet/sweeps").glob("*/"))) == 1
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, (
        "the orphan was ended before its folder was used again"
    )


def trainings_in(folder: Path) -> set[Path]:
    """The curves of trainings below a folder that have their first lines, and did not end."""
    return set(folder.glob("**/.reports.*.tmp/history.jsonl"))


def interrupt(search: Search, trial: optuna.Trial, material: Material) -> None:
    """Ctrl-C while it trains: the signal comes when the training has begun."""
    over, earlier = threading.Event(), trainings_in(search.folder)

    def watch() -> None:
        while not over.wait(0.05):
            if trainings_in(search.folder) - earlier:
                os.kill(os.getpid(), signal.SIGINT)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        search.run(trial, material)
    finally:
        over.set()
        watcher.join()


def test_other_rows_or_another_space_are_another_study(
    material: Material, tiny_config: Config, tmp_path: Path
) -> None:
    config = with_space(tiny_config, {"adapter.rank": [4, 8]})
    name = search_in(tmp_path / "home", config, material).name
    tokens = tmp_path / "tokens"
    shutil.copytree(material.tokens, tokens)
    write_json(tokens / "profile.json", {**read_json(tokens / "profile.json"), "sha256": {"train": "other"}})
    others = [
        search_in(tmp_path / "home", config, material._replace(tokens=tokens)).name,
        search_in(tmp_path / "home", with_space(tiny_config, {"adapter.rank": [4, 16]}), material).name,
        search_in(
            tmp_path / "home",
            with_space(
                tiny_config.model_copy(update={"train": TrainConfig(epochs=1)}), {"adapter.rank": [4, 8]}
            ),
            material,
        ).name,
    ]
    assert len({name, *others}) == 4
    more = with_space(tiny_config, {"adapter.rank": [4, 8]}, trials=30, seed=2)
    assert search_in(tmp_path / "home", more, material).name == name, "more trials go on with it"


def test_two_workers_on_one_storage_share_its_trials(
    material: Material, tiny_config: Config, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    config = with_space(tiny_config, {"adapter.rank": {"low": 1, "high": 512}}, trials=3, storage=url)
    one, other = (
        search_in(tmp_path / "one", config, material),
        search_in(tmp_path / "other", config, material),
    )
    assert one.name == other.name
    first, second, third = one.next(), other.next(), one.next()
    # One's first trial counts as lost when one asks again: a worker has one at a time. Other's runs on.
    assert first and second and third
    assert second.user_attrs["changes"] != first.user_attrs["changes"] == third.user_attrs["changes"]
    assert (
        optuna.load_study(study_name=other.name, storage=url).get_trials()[second.number].state
        == optuna.trial.TrialState.RUNNING
    )


def test_todays_settings_are_tried_once_when_two_machines_have_queued_them(
    material: Material, tiny_config: Config, tmp_path: Path
) -> None:
    config = with_space(
        tiny_config,
        {"adapter.rank": {"low": 1, "high": 512}},
        storage=(url := f"sqlite:///{tmp_path / 'shared.db'}"),
    )
    one, other = (
        search_in(tmp_path / "one", config, material),
        search_in(tmp_path / "other", config, material),
    )
    optuna.load_study(study_name=one.name, storage=url).enqueue_trial(
        {"adapter.rank": 4}, user_attrs={TODAY: True}
    )
    first, second = one.next(), other.next()
    assert first and second
    assert first.user_attrs["changes"] == {"adapter.rank": 4} != second.user_attrs["changes"]
    assert one.counts() == {"complete": 0, "pruned": 0, "fail": 0, "running": 2}


def test_the_same_settings_are_trained_once_and_a_small_space_ends_the_sweep(
    material: Material, tiny_config: Config, tmp_path: Path
) -> None:
    """Three settings and room for nine trials."""
    said: list[str] = []
    config = with_space(tiny_config, {"adapter.rank": [2, 4, 8]}, trials=9, startup_trials=9)
    search = search_in(tmp_path / "home", config, material, said)
    records = run_all(search, material)
    assert sorted(record.changes["adapter.rank"] for record in records) == [2, 4, 8]
    assert said[-1] == "sweep: all settings of the space are tried, 3 in number"
    assert search.counts() == {"complete": 3, "pruned": 0, "fail": 0, "running": 0}


def test_a_storage_that_is_away_is_named_without_its_password(
    material: Material, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_SWEEP_STORAGE", f"sqlite:////ana:secret@{tmp_path}/none/none.db")
    with pytest.raises(ServiceError, match="storage does not answer") as raised:
        search_in(tmp_path / "home", with_space(tiny_config, {"adapter.rank": [4]}), material)
    assert "secret" not in str(raised.value)


def test_going_on_from_a_champion_forbids_other_shapes(
    material: Material, tiny_config: Config, candidate: Path, tmp_path: Path
) -> None:
    incumbent = tmp_path / "incumbent"
    shutil.copytree(candidate, incumbent)
    write_json(incumbent / "manifest.json", {**read_json(incumbent / "manifest.json"), "version": 1})
    with pytest.raises(ConfigError, match=r"adapter\.rank.*start_from"):
        search_in(
            tmp_path / "home",
            with_space(tiny_config, {"adapter.rank": [4, 8]}),
            material._replace(incumbent=incumbent),
        )
    search_in(
        tmp_path / "home",
        with_space(tiny_config, {"train.learning_rate": [0.1]}),
        material._replace(incumbent=incumbent),
    )


# --- what comes of it ---


def written(folder: Path, number: int, state: str, **more: Any) -> dict[str, Any]:
    """A record as a trial leaves it."""
    rate = 10.0 ** -(number + 2)
    points = [
        {"step": 1, "time_ms": 1_700_000_000_000, "train_loss": 3.0},
        {"step": 2, "time_ms": 1_700_000_001_000, "validation_loss": 2.5},
    ]
    record = {
        "number": number,
        "study": "small-0123456789ab",
        "state": state,
        "value": None,
        "reason": "",
        "changes": {"train.learning_rate": rate},
        "command": f"dvc exp run --set-param ++train.learning_rate={rate} train",
        "commit": HASH,
        "began": 1_700_000_000.0,
        "ended": 1_700_000_002.0,
        "points": points,
        "figures": {},
        **more,
    }
    write_json(folder / f"trial-{number:04d}.json", record)
    return record


def test_each_trial_is_a_nested_run_also_when_mlflow_comes_later(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "study", tiny_config
    records = [
        written(folder, 0, "complete", value=2.5, figures={"steps": 2}),
        written(folder, 1, "fail", reason="DivergenceError: x"),
        written(folder, 2, "pruned", reason="worse"),
    ]
    use_no_mlflow(monkeypatch)
    with pytest.raises(ServiceError):
        deliver(folder, config)
    use_mlflow(monkeypatch, tmp_path)
    assert (deliver(folder, config), deliver(folder, config)) == (3, 0)
    parent = close_study(records[0]["study"], config, Best(0, 2.5, {}, records[0]["command"]), trials=3)
    client = mlflow_client()
    runs = client.search_runs([client.get_experiment_by_name(config.project.name).experiment_id])
    by_trial = {run.data.tags[TRIAL_TAG]: run for run in runs}
    assert len(runs) == 4 and {run.data.tags[STUDY_TAG] for run in runs} == {records[0]["study"]}
    assert (
        {by_trial[number].data.tags["mlflow.parentRunId"] for number in "012"}
        == {parent}
        == {by_trial["study"].info.run_id}
    )
    assert [by_trial[number].info.status for number in ("0", "1", "2", "study")] == [
        "FINISHED",
        "FAILED",
        "KILLED",
        "FINISHED",
    ]
    assert by_trial["0"].data.metrics == {
        "objective": 2.5,
        "train/steps": 2.0,
        "train_loss": 3.0,
        "validation_loss": 2.5,
    }
    assert (
        by_trial["0"].data.params["train.learning_rate"] == "0.01"
        and by_trial["0"].data.params["adapter.rank"] == "4"
    )
    assert by_trial["1"].data.tags["ratchet.reason"] == "DivergenceError: x"
    assert by_trial["0"].data.tags["ratchet.reproduce"] == records[0]["command"]


def test_the_best_settings_are_a_diff_that_keeps_the_comments(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(
        "# Ours\ntrain:\n  epochs: 2.0  # Ana tried 3\n  learning_rate: 2.0e-3\n", encoding="utf-8"
    )
    best = Best(3, 2.5, {"train.learning_rate": 5e-5, "adapter.target_modules": ["q_proj"]}, "dvc exp run …")
    shown = propose(tmp_path, best, apply=False)
    assert (
        "-  learning_rate: 2.0e-3\n+  learning_rate: 5.0e-5\n" in shown
        and "+adapter:\n+  target_modules: [q_proj]\n" in shown
    )
    assert load_config(tmp_path / "params.yaml").train.learning_rate == 2.0e-3, "shown, not written"
    assert propose(tmp_path, best, apply=True) == shown
    text = (tmp_path / "params.yaml").read_text(encoding="utf-8")
    assert text.startswith("# Ours\ntrain:\n  epochs: 2.0  # Ana tried 3\n")
    assert load_config(tmp_path / "params.yaml").train.learning_rate == 5e-5
    assert propose(tmp_path, best, apply=True) == ""


def test_a_value_that_stands_there_in_another_writing_is_no_change() -> None:
    text = "train:\n  learning_rate: 0.002  # peak\n  compile: false\n"
    assert edit_params(text, {"train.learning_rate": 2.0e-3, "train.compile": False}) == text
    assert "compile: true" in edit_params(text, {"train.compile": True}) and "0.003" in edit_params(
        text, {"train.learning_rate": 0.003}
    ).replace("3.0e-3", "0.003")


def test_a_change_of_the_whole_params_yaml_touches_its_lines_alone() -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    changed = edit_params(text, {"train.learning_rate": 1e-4, "base.revision": None, "train.epochs": 2.5})
    assert [line for line in diff_params(text, changed).splitlines() if line.startswith(("+ ", "- "))] == [
        line
        for line in diff_params(text, changed).splitlines()
        if "epochs" in line[:12] or "learning_rate" in line[:18]
    ]
    assert edit_params(text, {}) == text


CHANGES = {
    "train.learning_rate": 1.234e-5,
    "train.epochs": 2.0,
    "adapter.rank": 16,
    "adapter.target_modules": ["q_proj", "v_proj"],
    "adapter.method": "rslora",
    "train.checkpoint_activations": True,
    "base.model": "org/na-me.2",
    "base.revision": "1" * 40,
}


def test_the_dvc_command_yields_the_trials_params(tmp_path: Path) -> None:
    """As an experiment of a real repository, whose one stage copies its params."""
    stage = (
        "stages:\n  train:\n    cmd: cp params.yaml out.yaml\n    params: [train, adapter, base]\n"
        "    outs:\n      - out.yaml:\n          cache: false\n"
    )
    root = make_repository(
        tmp_path / "checkout",
        {"params.yaml": render_params(Config()), "dvc.yaml": stage, ".gitignore": ".ratchet/\n"},
    )
    command = shlex.split(dvc_command(CHANGES))
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=root,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert load_config(root / "out.yaml") == with_changes(Config(), CHANGES)


def test_the_command_refuses_a_space_before_anything_runs(tmp_path: Path) -> None:
    root = make_repository(tmp_path / "checkout")
    write_files(root, {"params.yaml": "sweep:\n  space:\n    adapter.rank: [8, 1000]\n"})
    commit(root, "A space")
    environment = {**child_environment(), "MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-m", "ratchet.cli", "-C", str(root), "sweep"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (
        2,
        "",
    ) and "adapter.rank: Input should be less than or equal to 512, got 1000" in done.stderr
    assert not (root / ".ratchet/sweeps").exists() and not (root / ".ratchet/workspaces").exists()


def test_ranges_say_what_is_wrong_with_them() -> None:
    for values, wanted in (
        ({"low": 2, "high": 1}, "is not under high"),
        ({"low": 0, "high": 1, "log": True}, "log wants low over 0"),
        ({"low": 0, "high": 1, "step": 0}, "step is 0"),
    ):
        with pytest.raises(ValueError, match=wanted):
            SweepRange.model_validate(values)
    with pytest.raises(ConfigError, match=r"sweep\.space\.adapter\.rank: "):
        with_changes(Config(), {"sweep.space": {"adapter.rank": []}})
    assert json.loads(SweepRange(low=1, high=2).model_dump_json())["low"] == 1
