"""params.yaml: what is refused and how it is said, and that the files made from the models are true."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml as pyyaml  # YAML 1.1, where ratchet reads 1.2
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from ratchet.config import docs as config_doc
from ratchet.config.data import ProjectConfig
from ratchet.config.params import Config, load_config, parse_config
from ratchet.config.setup import Answers, write_params
from ratchet.config.survey import keys_of, read_settings
from ratchet.config.training import TrainConfig, kind_of_base
from ratchet.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]
RENAMED = [
    ("prepare", "retention_days", "max_age_days"),
    ("request_log", "retention_days", "keep_days"),
]


def faults(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- what is refused ---


def test_unknown_section_is_named_with_the_known_ones(tmp_path):
    message = faults(tmp_path, "trian:\n  epochs: 3\n")
    assert "trian: unknown key (value {'epochs': 3})" in message
    assert all(section in message for section in Config.model_fields)


def test_unknown_key_is_named_with_its_path_its_value_and_the_known_keys(tmp_path):
    message = faults(tmp_path, "train:\n  epoch: 3\n")
    assert "train.epoch: unknown key (value 3)" in message
    assert f"known there: {', '.join(TrainConfig.model_fields)}" in message


def test_unknown_key_of_a_nested_section_is_named_with_the_keys_known_there(tmp_path):
    message = faults(tmp_path, "ingest:\n  jsonl:\n    file: rows.jsonl\n")
    assert "ingest.jsonl.file: unknown key (value 'rows.jsonl'); known there: path, form" in message


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train: {epochs: many}", "train.epochs", "'many'"),
        ("train: {seed: 1.5}", "train.seed", "1.5"),
        ("train: 4", "train", "4"),
        ("gate: null", "gate", "None"),
        ("ingest: {pydoc: {packages: stdlib}}", "ingest.pydoc.packages", "'stdlib'"),
        ("ingest: {pydoc: {packages: []}}", "ingest.pydoc.packages", "[]"),
        ("prepare: {test_share: 1.5}", "prepare.test_share", "1.5"),
        ("adapter: {method: vera}", "adapter.method", "'vera'"),
        ("project: {name: My Model}", "project.name", "'My Model'"),
        ("services: {mlflow_port: 70000}", "services.mlflow_port", "70000"),
    ],
)
def test_wrong_value_is_named_with_its_key(tmp_path, text, key, value):
    message = faults(tmp_path, text)
    assert f"  {key}: " in message
    assert f"got {value}" in message


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, number):
    """A NaN in the gate would make every comparison false."""
    assert "gate.min_gain: " in faults(tmp_path, f"gate: {{min_gain: {number}}}")


def test_three_faults_are_three_lines_in_one_error(tmp_path):
    message = faults(tmp_path, "train:\n  epochs: many\n  seeds: 3\nprepare:\n  max_chars: 0\n")
    assert "has 3 fault(s)" in message
    lines = [line for line in message.splitlines() if line.startswith("  ") and "→" not in line]
    assert sorted(line.strip().split(":")[0] for line in lines) == [
        "prepare.max_chars",
        "train.epochs",
        "train.seeds",
    ]


@pytest.mark.parametrize("root", ["[]", "0", "text", "- train", "false"])
def test_a_root_that_is_no_mapping_is_refused(tmp_path, root):
    assert "(top level): " in faults(tmp_path, root)


def test_an_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == Config()


def test_missing_file_is_named_with_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"params\.yaml does not exist\n  → .*-C PATH"):
        load_config(tmp_path / "params.yaml")


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)


def test_invalid_yaml_is_named_with_its_line_and_column(tmp_path):
    assert "is no valid YAML: line 2, column 1: " in faults(tmp_path, "train:\n\tepochs: 3\n")


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfet\x00",
        b"train: \xe9",
        "a: 2020-13-45",
        "a: !!python/object:os.system {}",
        "a: 1\n---\nb: 2",
        "a: \x00",
    ],
)
def test_what_yaml_cannot_hold_is_refused_as_invalid(tmp_path, text):
    assert "is no valid YAML: " in faults(tmp_path, text)


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    message = faults(tmp_path, "train:\n  epochs: 1\n  epochs: 2\n")
    assert "line 3, column 3: " in message
    assert 'duplicate key "epochs"' in message
    assert "suppress" not in message  # the library's advice would hide the fault


@pytest.mark.parametrize(
    "revision", ["null", "main", "v1.0", "0123456789abcdef", f'"{"G" * 40}"', f'"{"A" * 40}"']
)
def test_hub_id_needs_its_commit(tmp_path, revision):
    message = faults(tmp_path, f"base:\n  model: org/name\n  revision: {revision}\n")
    assert "base.revision" in message
    assert "40 hex digits" in message


def test_hub_id_with_its_commit_is_taken():
    config = parse_config({"base": {"model": "org/name", "revision": "0123456789" * 4}}, Path("params.yaml"))
    assert config.base.revision == "0123456789" * 4


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("demo", "demo"),
        ("gpt2", "hub"),
        ("org/name-1.5", "hub"),
        ("org/name:sub/model-Q4_K_M.gguf", "hub"),
        ("./models-in/small", "path"),
        ("../small", "path"),
        ("/srv/small", "path"),
        ("~/small", "path"),
        ("models-in/small.gguf", "path"),
        ("small.gguf", "path"),
        ("a/b/c", "path"),
        ("s3://bucket/small", "url"),
        ("memory://small.gguf", "url"),
        ("v3", "version"),
        ("registered:claims/v12", "version"),
        ("./v3", "path"),
    ],
)
def test_what_a_base_is_shows_in_its_form(model, kind):
    assert kind_of_base(model) == kind


@pytest.mark.parametrize("model", ["./small", "s3://bucket/small", "v3"])
@pytest.mark.parametrize(("revision", "taken"), [("null", True), (f'"{"a" * 64}"', True), ("main", False)])
def test_a_base_that_is_no_hub_id_may_be_pinned_by_its_sum(tmp_path, model, revision, taken):
    text = f"base:\n  model: {model}\n  revision: {revision}\n"
    if taken:
        (tmp_path / "params.yaml").write_text(text)
        assert load_config(tmp_path / "params.yaml").base.model == model
    else:
        assert "64 hex digits" in faults(tmp_path, text)


def test_a_folder_that_looks_like_a_hub_id_is_told_how_paths_begin(tmp_path):
    assert "begins with `./`" in faults(tmp_path, "base:\n  model: models-in/small\n")


def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path):
    message = faults(tmp_path, "base:\n  model: s3://ana:hidden@bucket/small\n")
    assert "environment" in message and "hidden" not in message


def test_a_registered_version_needs_its_number(tmp_path):
    assert "registered:NAME/vN" in faults(tmp_path, "base:\n  model: registered:claims\n")


def test_a_longest_row_beyond_the_window_is_refused_with_both_numbers(tmp_path):
    message = faults(tmp_path, "tokenize: {max_length: 600, window: 512}")
    assert "tokenize.max_length (600) is over tokenize.window (512)" in message


def test_splits_that_leave_nothing_to_train_are_refused(tmp_path):
    assert "nothing is left to train on" in faults(
        tmp_path, "prepare: {validation_share: 0.5, test_share: 0.4}"
    )


def test_a_config_cannot_be_changed_after_it_was_read():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.epochs = 9.0


# --- renamed keys ---


@pytest.mark.parametrize(("section", "old", "new"), RENAMED)
def test_an_old_key_is_read_with_a_note(tmp_path, section, old, new):
    (tmp_path / "params.yaml").write_text(f"{section}: {{{old}: 3}}\n")
    program = (
        "from pathlib import Path\nfrom ratchet.config.params import load_config\n"
        f"for _ in range(2): print(load_config(Path('params.yaml')).{section}.{new})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [float(line) for line in done.stdout.split()] == [3, 3]
    [note] = done.stderr.splitlines()
    assert f"{section}.{old}" in note and f"{section}.{new}" in note


@pytest.mark.parametrize(("section", "old", "new"), RENAMED)
def test_an_old_key_beside_its_new_name_is_refused(tmp_path, section, old, new):
    message = faults(tmp_path, f"{section}: {{{old}: 3, {new}: 4}}\n")
    assert f"{section}.{old}" in message and f"{section}.{new}" in message


def test_importing_one_section_does_not_import_all():
    program = (
        "import sys, ratchet.config.training; print(*(name for name in sys.modules if 'config.' in name))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {name for name in done.stdout.split() if name.startswith("ratchet.")} == {
        "ratchet.config.base",
        "ratchet.config.training",
    }


# --- docs/params.md and params.yaml ---


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    nested = [config_doc.section_of(field.annotation) for field in model.model_fields.values()]
    return [model, *(found for section in nested if section for found in sections(section))]


def test_docs_params_md_is_what_the_models_say():
    assert (ROOT / "docs/params.md").read_text(encoding="utf-8") == config_doc.render(), (
        "write it again: python -m ratchet.config.docs"
    )


def dotted(values: dict, prefix: str = "") -> set[str]:
    return {
        name
        for key, value in values.items()
        for name in (dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key})
    }


def test_params_yaml_holds_what_people_change_and_what_dvc_names():
    values = pyyaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    found = dotted(values)
    assert found == config_doc.SURVEYED <= set(keys_of(Config)) and 30 <= len(found) <= 61
    tracked = {
        key
        for stage in pyyaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
        for key in stage.get("params", [])
    }
    lacking = {key for key in tracked if not any(f"{one}.".startswith(f"{key}.") for one in found)}
    assert lacking == set() and len(tracked) > 10, "DVC refuses to run a stage without them"
    assert load_config(ROOT / "params.yaml") == Config()


def test_each_setting_is_told_with_its_default_and_where_it_was_set(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("train: {epochs: 3.0, seed: 4}\nmonitor: {topics: 2}\n")
    everything = {one.key: one for one in read_settings(path, everything=True)}
    assert set(everything) == set(keys_of(Config))
    assert everything["train.seed"] == ("train.seed", 4, 17, "params.yaml")
    assert everything["train.epochs"] == ("train.epochs", 3.0, 3.0, "params.yaml")
    assert everything["train.replay"].set_in == ""
    few = {one.key for one in read_settings(path, everything=False)}
    assert few == {*config_doc.SURVEYED, "monitor.topics", "train.seed"}


def test_every_key_is_read_somewhere():
    """A key that nothing reads would be a promise that nobody keeps."""
    places = [path for layer in ("ratchet", "tasks", "flows") for path in (ROOT / layer).rglob("*.py")]
    read = {
        node.attr
        for path in places
        if ROOT / "ratchet/config" not in path.parents
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    unread = {key for key in keys_of(Config) if key.rpartition(".")[2] not in read}
    assert unread == set() and len(read) > 500


def test_a_written_params_yaml_loads_to_exactly_the_defaults(tmp_path):
    (tmp_path / "params.yaml").write_text(config_doc.render_params(Config()), encoding="utf-8")
    assert load_config(tmp_path / "params.yaml") == Config()


def test_every_key_and_every_section_says_what_it_is():
    found = sections(Config)
    assert len(found) > 10
    keys = {
        f"{model.__name__}.{key}": field
        for model in found
        for key, field in model.model_fields.items()
        if not config_doc.section_of(field.annotation)
    }
    assert [name for name, field in keys.items() if not field.description] == []
    assert [model.__name__ for model in found if model is not Config and not model.__doc__] == []


def test_docs_params_md_has_one_row_a_key_with_its_bounds_and_default():
    rows = [line for line in config_doc.render().splitlines() if line.startswith("| `")]
    assert len(rows) == sum(
        not config_doc.section_of(field.annotation)
        for model in sections(Config)
        for field in model.model_fields.values()
    )
    assert any(row.startswith("| `prepare.near_duplicate` | number, > 0, <= 1 | ") for row in rows)
    assert any(row.startswith("| `train.replay` | number, 0..1 | ") for row in rows)
    assert any(row.startswith("| `services.start_timeout` | integer, >= 1 | ") for row in rows)
    assert any(row.startswith("| `promotion` | `rollout`, `auto`, `manual` | `rollout` | ") for row in rows)
    assert all(row.count(" | ") == 3 for row in rows)


@settings(deadline=None, max_examples=30)  # 40 ms each: PyYAML is slow
@given(
    path=st.text(),
    licence=st.text(max_size=8),
    rate=st.floats(min_value=5e-324, allow_infinity=False),
    gain=st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_config_is_read_back_equal_by_yaml_1_1_and_1_2(tmp_path_factory, path, licence, rate, gain):
    values = Config.model_validate(
        {
            "ingest": {"licence": licence, "jsonl": {"path": path}, "pydoc": {"packages": [path, licence]}},
            "train": {"learning_rate": rate},
            "gate": {"min_gain": gain},
        }
    )
    text = config_doc.render_params(values)
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_config(file) == values
    assert pyyaml.safe_load(text) == values.model_dump()


@pytest.mark.parametrize(
    "word",
    [
        "no",
        "Yes",
        "on",
        "null",
        "~",
        "1e5",
        "0x10",
        "1_000",
        "2020-01-01",
        "a: b",
        "# c",
        "",
        " x",
        "1:30",
        "demo",
    ],
)
def test_words_that_yaml_takes_for_another_type_stay_text(word):
    values = Config.model_validate({"ingest": {"licence": word}})
    assert pyyaml.safe_load(config_doc.render_params(values))["ingest"]["licence"] == word


def test_check_leaves_the_files_alone_and_exits_1_only_when_one_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, path in (([], Path("docs/params.md")), (["--params"], Path("params.yaml"))):
        with pytest.raises(SystemExit, match="differs"):
            config_doc.main([*flags, "--check"])
        assert not path.exists()
        config_doc.main(flags)
        config_doc.main([*flags, "--check"])
        path.write_text(path.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
        with pytest.raises(SystemExit, match="differs"):
            config_doc.main([*flags, "--check"])
        assert path.read_text(encoding="utf-8").endswith("more\n")


def test_the_name_of_the_model_fits_a_git_tag_and_a_folder():
    for name in ("", ".hidden", "-flag", "a b", "a/b", "Ä"):
        with pytest.raises(ValueError, match="pattern"):
            ProjectConfig(name=name)


# --- ratchet init ---


def test_the_answers_to_five_questions_are_a_params_yaml(tmp_path):
    path, revision = tmp_path / "params.yaml", "0123456789" * 4
    answers = Answers(
        f"org/name@{revision}", "exports/*.jsonl", "numeric_match", gpu=True, promotion="manual"
    )
    write_params(path, answers)
    found = load_config(path)
    assert (found.base.model, found.base.revision) == ("org/name", revision)
    assert (found.ingest.source, found.ingest.jsonl.path) == ("jsonl", "exports/*.jsonl")
    assert (found.gate.metric, found.adapter.method, found.promotion) == ("numeric_match", "qlora", "manual")
    assert dotted(pyyaml.safe_load(path.read_text())) == config_doc.SURVEYED
    assert path.read_text() == config_doc.render_params(found, config_doc.SURVEYED), "comments stay in line"
    assert max(map(len, path.read_text().splitlines())) <= config_doc.WIDTH
    write_params(path, Answers(), force=True)
    assert load_config(path) == Config()


def test_a_changed_params_yaml_is_replaced_only_by_force(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(config_doc.render_params(Config(), config_doc.SURVEYED))
    write_params(path, Answers(promotion="auto"))
    before = path.read_text()
    with pytest.raises(UserError, match="--force"):
        write_params(path, Answers(promotion="manual"))
    assert path.read_text() == before
    write_params(path, Answers(promotion="manual"), force=True)
    assert load_config(path).promotion == "manual"


@pytest.mark.parametrize(
    "answers", [Answers(base="org/name"), Answers(metric="fluency"), Answers(promotion="nobody")]
)
def test_an_answer_that_no_params_yaml_may_hold_writes_nothing(tmp_path, answers):
    with pytest.raises(ConfigError):
        write_params(tmp_path / "params.yaml", answers, force=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("/nonexistent", "/nonexistent does not exist"),
        ("./nothing", r"\./nothing does not exist in "),
        ("~/nothing-of-that-name", "does not exist"),
        ("./nothing.gguf", "does not exist"),
        ("./empty", "holds no weights"),
        ("./notes.txt", "holds no weights"),
        ("models/mine", r"write \./models/mine"),
        ("mine", r"write \./mine"),
    ],
)
def test_a_base_that_is_not_where_it_is_said_to_be_is_refused(tmp_path, base, said):
    for folder in ("models/mine", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=said):
        write_params(tmp_path / "params.yaml", Answers(base=base), force=True)
    assert not (tmp_path / "params.yaml").exists()


def test_a_base_that_is_here_or_comes_from_elsewhere_is_taken(tmp_path):
    (tmp_path / "models/mine").mkdir(parents=True)
    (tmp_path / "models/mine/model.safetensors").touch()
    (tmp_path / "models/one.gguf").touch()
    (tmp_path / "models/fetched.dvc").touch()  # DVC brings what it stands for
    for base in (
        "demo",
        "./models/mine",
        str(tmp_path / "models/mine"),
        "./models/one.gguf",
        "./models/fetched",
        "./models/fetched/inside",
        "s3://bucket/model",
        "v3",
        f"models/mine@{'0' * 40}",
    ):
        write_params(tmp_path / "params.yaml", Answers(base=base), force=True)
        assert load_config(tmp_path / "params.yaml").base.model == base.partition("@")[0]


PREFERENCES = {"train": {"objective": "dpo"}, "evaluate": {"metrics": ["exact_match", "preference"]}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluate": {"metrics": ["exact_match"]}}, "evaluate.metrics lacks `preference`"),
        ({"train": {"objective": "kto", "teacher": "champion"}}, "train.teacher"),
        ({"train": {"objective": "kto", "neftune_alpha": 5.0}}, "train.neftune_alpha"),
        (
            {"gate": {"metric": "preference"}, "evaluate": {"metrics": ["preference"], "attacks": 3}},
            "evaluate.attacks",
        ),
    ],
)
def test_preferences_go_with_what_can_measure_them(change, said):
    Config.model_validate(PREFERENCES)
    with pytest.raises(ValueError, match=said):
        Config.model_validate(PREFERENCES | change)


PRIVATE = {"privacy": {"epsilon": 3.0}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"objective": "dpo"}, "evaluate": {"metrics": ["preference"]}}, "no gradient of a single"),
        ({"train": {"teacher": "champion"}}, "train.teacher is 'champion'"),
        ({"train": {"neftune_alpha": 5.0}}, "longest row of a forward pass"),
        ({"train": {"accumulate": 4}}, "train.privacy.batch_rows"),
        ({"train": {"accumulate": 2, "processes": 2}}, "train.accumulate is 2"),
        ({"train": {"compile": True}}, "train.compile: false"),
        ({"train": {"checkpoint_activations": True}}, "would save nothing"),
        ({"train": {"precision": "float16"}}, "scales the loss"),
        ({"adapter": {"method": "dora"}}, "adapter.method is dora"),
        ({"adapter": {"method": "full"}}, "`lora`, `rslora` and `qlora` only"),
        ({"adapter": {"method": "qlora", "quantisation": "int8"}}, "looks for outliers in all rows"),
        ({"adapter": {"dropout": 0.1}}, "adapter.dropout is 0.1"),
        ({"adapter": {"bias": "all"}}, "adapter.bias"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, "whole modules have no gradients"),
        ({"adapter": {"projector": "lora"}}, "pictures do not stand in rows"),
        ({"base": {"new_tokens": ["tort"]}}, "base.new_tokens"),
        ({"train": {"privacy": {"epsilon": 3.0, "budget": 2.0}}}, "no training could start"),
    ],
)
def test_privacy_is_refused_where_it_could_not_be_kept(change, said):
    """Each goes without privacy, except for the budget."""
    private = {**change, "train": {**PRIVATE, **change.get("train", {})}}
    with pytest.raises(ValueError, match=said):
        Config.model_validate(private)
    if "privacy" not in change.get("train", {}):
        Config.model_validate(change)


def test_privacy_goes_with_the_methods_that_have_gradients_by_row():
    for adapter in ({"method": "lora"}, {"method": "rslora"}, {"method": "qlora"}):
        found = Config.model_validate({"train": PRIVATE, "adapter": adapter}).train.privacy
        assert (found.epsilon, found.most) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"proximal": -0.1}, "train.proximal"),
        ({"proximal": float("inf")}, "train.proximal"),
        ({"optimizer": "sgd", "learning_rate": 0.1, "proximal": 11}, "proximal 11 times .* is over 1"),
    ],
)
def test_a_pull_to_the_start_that_would_go_beyond_it_is_refused(train, said):
    Config.model_validate({"train": {**train, "proximal": 1}})
    with pytest.raises(ValueError, match=said):
        Config.model_validate({"train": train})
