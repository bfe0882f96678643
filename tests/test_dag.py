"""dvc.yaml says what the code does: a stage goes stale when its inputs, its code or its knobs change, and only then."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from ratchet.config import Config
from ratchet.dag import STAGES, imported, modules_of

ROOT = Path(__file__).parents[1]
DAG = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
# Inputs that no stage makes: rows come by `ingest`, the champion by a promotion, metrics of one's own by hand, looks by a retraining.
FROM_OUTSIDE = {"data/raw", "data/golden.jsonl", "data/forgotten.jsonl", "data/region.json", "models/incumbent", "metrics", "reports/looks.json"}

# The experiment that gets a copy of the curve: no output depends on it.
HARMLESS = {"train": {"project.name"}}


def flags(stage: str) -> dict[str, str]:
    words = DAG[stage]["cmd"].split()
    assert words[:2] == ["python", "-m"]
    return dict(zip(words[3::2], words[4::2], strict=True))


def deps(stage: str) -> list[str]:
    return DAG[stage].get("deps", [])


def outputs(stage: str) -> list[str]:
    found = [*DAG[stage].get("outs", []), *DAG[stage].get("metrics", [])]
    return [out if isinstance(out, str) else next(iter(out)) for out in found]


def test_stages_stand_in_the_order_in_which_flows_run_them():
    assert tuple(DAG) == STAGES
    assert len(STAGES) == 7


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_module_and_a_section_of_the_params(stage):
    assert DAG[stage]["cmd"].split()[:3] == ["python", "-m", f"tasks.{stage}"]
    assert (ROOT / "tasks" / f"{stage}.py").exists()
    assert stage in Config.model_fields
    assert Config.model_fields[stage].annotation.__name__ == f"{stage.capitalize()}Config"


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_that_a_stage_depends_on_is_all_that_it_imports(stage):
    assert [path for path in deps(stage) if path.endswith(".py")] == modules_of(stage, ROOT)


@pytest.mark.parametrize("stage", STAGES)
def test_the_paths_that_a_command_names_are_the_inputs_and_outputs(stage):
    """Code holds no path, so every path stands in `cmd`, and DVC knows it."""
    inputs = {path for path in deps(stage) if not path.endswith(".py")}
    assert set(flags(stage).values()) == inputs | set(outputs(stage))
    assert flags(stage)["--out"] in outputs(stage)


def test_every_input_is_made_by_an_earlier_stage_or_comes_from_outside():
    made: set[str] = set()
    for stage in STAGES:
        inputs = {path for path in deps(stage) if not path.endswith(".py")}
        assert inputs <= made | FROM_OUTSIDE, f"{stage}: {inputs - made - FROM_OUTSIDE} is made nowhere"
        assert not made & set(outputs(stage)), f"{stage} writes what another stage wrote"
        made |= set(outputs(stage))
    used = {path for stage in STAGES for path in deps(stage)}
    assert made - used == {"reports/gate.json"}  # what people and the flow read, and no stage


def test_no_stage_depends_on_the_ledger():
    """champion.json moves with every promotion: a stage that reads it would be stale after each."""
    assert not any("champion.json" in deps(stage) for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_the_knobs_that_a_stage_depends_on_exist(stage):
    assert stage in DAG[stage]["params"]
    for key in DAG[stage]["params"]:
        model: type[BaseModel] = Config
        for part in key.split("."):
            assert part in model.model_fields, f"{stage}: params.yaml has no key {key}"
            model = model.model_fields[part].annotation


def test_a_knob_of_another_section_that_a_stage_reads_is_among_its_params():
    """Or no output would change with it."""
    for stage in STAGES:
        read = set(re.findall(r"config\.([a-z]+)\.([a-z_]+)", (ROOT / "tasks" / f"{stage}.py").read_text(encoding="utf-8")))
        sections = {(section, key) for section, key in read if section in Config.model_fields and key in Config.model_fields[section].annotation.model_fields}
        known = DAG[stage]["params"]
        missing = {f"{section}.{key}" for section, key in sections if section not in known and f"{section}.{key}" not in known}
        assert missing - HARMLESS.get(stage, set()) == set()


def test_imports_are_found_at_the_head_in_functions_and_by_name(tmp_path):
    (tmp_path / "ratchet").mkdir()
    (tmp_path / "tasks").mkdir()
    for name in ("ratchet/one", "ratchet/two", "ratchet/three", "ratchet/types", "ratchet/deep", "tasks/work"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "ratchet/three.py").write_text("from ratchet.deep import x\n")
    (tmp_path / "tasks/work.py").write_text(
        "import os\nimport ratchet.one as one\nfrom ratchet import two\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ratchet.types import Y\ndef f():\n    from ratchet.three import z\n"
    )
    assert modules_of("work", tmp_path) == ["ratchet/deep.py", "ratchet/one.py", "ratchet/three.py", "ratchet/two.py", "tasks/work.py"]


def test_modules_that_import_each_other_end():
    assert "ratchet/workspace.py" in imported(ROOT / "ratchet" / "champion.py", ROOT)
    assert modules_of("train", ROOT) == sorted(set(modules_of("train", ROOT)))


def test_no_module_of_a_stage_uses_relative_imports():
    """The search does not follow them."""
    paths = {path for stage in STAGES for path in modules_of(stage, ROOT)}
    assert len(paths) > 20
    relative = [path for path in paths for node in ast.walk(ast.parse((ROOT / path).read_bytes())) if isinstance(node, ast.ImportFrom) and node.level]
    assert relative == []
