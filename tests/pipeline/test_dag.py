"""dvc.yaml says what the code does: a stage goes stale by its inputs, code or params, and by nothing else."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from places import commit, make_repository, use_git_without_a_user, write_files
from pydantic import BaseModel
from ruamel.yaml import YAML

from ratchet.config.params import Config
from ratchet.evaluation.answer_cache import CODE
from ratchet.pipeline.checkout import dvc
from ratchet.pipeline.dag import KEYS, STAGES, TOLD, code_key, modules_of, stage_key, templates_of
from ratchet.pipeline.dvc import check_out, downstream, stale_stages
from ratchet.pipeline.workspace import open_workspace

ROOT = Path(__file__).parents[2]
DAG = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
# Inputs that no stage makes: rows come by `ingest`, the champion by a promotion, own metrics by hand,
# and looks by a retraining.
ROWS = {"data/raw", "data/golden.jsonl", "data/forgotten.jsonl", "data/region.json"}
FROM_OUTSIDE = {*ROWS, "models/incumbent", "metrics", "reports/looks.json"}

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


def is_code(path: str) -> bool:
    return Path(path).parent == KEYS


def test_stages_stand_in_the_order_in_which_flows_run_them():
    assert tuple(DAG) == ("code", *STAGES)
    assert len(STAGES) == 7


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_module_and_a_section_of_the_params(stage):
    assert DAG[stage]["cmd"].split()[:3] == ["python", "-m", f"tasks.{stage}"]
    assert (ROOT / "tasks" / f"{stage}.py").exists()
    assert stage in Config.model_fields
    assert Config.model_fields[stage].annotation.__name__ == f"{stage.capitalize()}Config"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_its_own_code(stage):
    assert [path for path in deps(stage) if is_code(path)] == [f"{KEYS}/{stage}"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_paths_that_a_command_names_are_the_inputs_and_outputs(stage):
    """Code holds no path, so every path stands in `cmd`, and DVC knows it."""
    inputs = {path for path in deps(stage) if not is_code(path)}
    assert set(flags(stage).values()) == inputs | set(outputs(stage))
    assert flags(stage)["--out"] in outputs(stage)


def test_every_input_is_made_by_an_earlier_stage_or_comes_from_outside():
    made: set[str] = set()
    for stage in STAGES:
        inputs = {path for path in deps(stage) if not is_code(path)}
        assert inputs <= made | FROM_OUTSIDE, f"{stage}: {inputs - made - FROM_OUTSIDE} is made nowhere"
        assert not made & set(outputs(stage)), f"{stage} writes what another stage wrote"
        made |= set(outputs(stage))
    used = {path for stage in STAGES for path in deps(stage)}
    # What people and the flow read, and no stage.
    assert made - used == {"reports/base.json", "reports/gate.json"}


@pytest.mark.parametrize(
    ("stale", "after"),
    [
        ({"base"}, ["tokenize", "train", "evaluate", "parity", "gate"]),
        ({"prepare", "train"}, ["tokenize", "evaluate", "parity", "gate"]),
        ({"evaluate"}, ["gate"]),
        ({"gate"}, []),
        (set(), []),
        (set(STAGES), []),
    ],
)
def test_the_stages_after_a_stale_one_are_those_that_read_what_it_makes(stale, after):
    assert downstream(ROOT, stale) == after


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
        source = (ROOT / "tasks" / f"{stage}.py").read_text(encoding="utf-8")
        known = DAG[stage]["params"]
        missing = set()
        for section, key in set(re.findall(r"config\.([a-z]+)\.([a-z_]+)", source)):
            found = Config.model_fields.get(section)
            if not found or key not in found.annotation.model_fields:
                continue
            if section not in known and f"{section}.{key}" not in known:
                missing.add(f"{section}.{key}")
        assert missing - HARMLESS.get(stage, set()) == set()


def test_the_keys_are_made_anew_whenever_dvc_looks():
    assert DAG["code"] == {
        "cmd": f"python -m ratchet.pipeline.dag --out {KEYS}",
        "always_changed": True,
        "outs": [{str(KEYS): {"cache": False}}],
    }


# --- which modules and templates ---


def test_imports_are_found_at_the_head_in_functions_and_by_name(tmp_path):
    names = ("one", "two", "types", "deep", "unused")
    files = {f"ratchet/{name}": "" for name in names} | {
        "ratchet/__init__": "",
        "ratchet/three": "from ratchet.deep import x\n",
        "ratchet/package/__init__": "from ratchet.package import inner\n",
        "ratchet/package/inner": "",
        "tasks/work": "import os\nimport ratchet.one as one\nfrom ratchet import two\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ratchet.types import Y\ndef f():\n    from ratchet.three import z\n"
        "    import ratchet.package\n",
    }
    write_files(tmp_path, {f"{name}.py": text for name, text in files.items()})
    assert modules_of(["tasks/work.py"], tmp_path) == [
        "ratchet/__init__.py",
        "ratchet/deep.py",
        "ratchet/one.py",
        "ratchet/package/__init__.py",
        "ratchet/package/inner.py",
        "ratchet/three.py",
        "ratchet/two.py",
        "tasks/work.py",
    ]


def test_modules_that_import_each_other_end(tmp_path):
    write_files(tmp_path, {"ratchet/a.py": "import ratchet.b\n", "ratchet/b.py": "import ratchet.a\n"})
    assert modules_of(["ratchet/a.py"], tmp_path) == ["ratchet/a.py", "ratchet/b.py"]


def test_no_module_of_a_stage_uses_relative_imports():
    """The search does not follow them."""
    paths = set(modules_of([f"tasks/{stage}.py" for stage in STAGES], ROOT))
    assert len(paths) > 20
    for path in paths:
        nodes = ast.walk(ast.parse((ROOT / path).read_bytes()))
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes), path


def test_a_template_belongs_to_the_module_beside_it_that_names_it_and_what_it_includes(tmp_path):
    names = {"by_name.html": "{% include 'part.html' %}", "part.html": "", "ended.j2": "", "other.html": ""}
    files = {f"ratchet/templates/{name}": text for name, text in names.items()}
    modules = {"a": 'get("by_name.html")\n', "b": 'get(f"{name}.j2")\n', "c": ""}
    write_files(tmp_path, files | {f"ratchet/{name}.py": text for name, text in modules.items()})
    found = [[Path(path).name for path in templates_of(f"ratchet/{name}.py", tmp_path)] for name in "abc"]
    assert found == [["by_name.html", "part.html"], ["ended.j2"], []]


# --- what changes a key ---


@pytest.fixture
def tree(tmp_path) -> Path:
    for name in ("ratchet", "tasks", "flows", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def keys(root: Path) -> dict[str, str]:
    return {stage: stage_key(stage, root) for stage in STAGES} | {"answers": code_key(CODE, root)}


def changed(root: Path, change: Callable[[], object]) -> set[str]:
    """Names of the stages (and `answers`) whose key another one is after `change`."""
    before = keys(root)
    change()
    after = keys(root)
    return {name for name in before if after[name] != before[name]}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def everywhere(root: Path, change: Callable[[str], str]) -> None:
    for path in sorted(root.rglob("*.py")):
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def with_other_docstrings(source: str) -> str:
    """Layout and comments go too: a module comes out as `ast.unparse` writes it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0] = ast.Expr(ast.Constant("Other words."))
    return ast.unparse(ast.fix_missing_locations(tree))


def with_comments(source: str) -> str:
    return f"# a comment\n{source}\n\n# another\n"


@pytest.mark.parametrize("change", [with_comments, with_other_docstrings])
def test_what_people_read_in_a_module_changes_no_key(tree, change):
    assert changed(tree, lambda: everywhere(tree, change)) == set()


def test_help_texts_and_descriptions_of_knobs_change_no_key(tree):
    seen = []

    def retell(text: str) -> str:
        parsed = ast.parse(text)
        for node in ast.walk(parsed):
            if isinstance(node, ast.keyword) and node.arg in TOLD and isinstance(node.value, ast.Constant):
                node.value = ast.Constant("other words")
                seen.append(node.arg)
        return ast.unparse(parsed)

    assert changed(tree, lambda: everywhere(tree, retell)) == set()
    assert set(seen) == set(TOLD) and len(seen) > 100


BESIDE = [
    "ratchet/cli/main.py",
    "ratchet/cli/training.py",
    "ratchet/gateway/app.py",
    "ratchet/gateway/review_page.py",
    "ratchet/reporting/dashboard_view.py",
    "ratchet/reporting/evaluation_page.py",
    "ratchet/reporting/templates/page.html",
    "ratchet/reporting/templates/evaluation.html",
    "ratchet/gateway/templates/review.html",
    "flows/retrain.py",
    "tasks/promote.py",
    "docs/gate.md",
]


@pytest.mark.parametrize("path", BESIDE)
def test_commands_gateway_pages_flows_and_docs_are_no_code_of_a_stage(tree, path):
    def change() -> None:
        with (tree / path).open("a", encoding="utf-8") as out:
            out.write("\nADDED = 1\n")

    assert changed(tree, change) == set()


@pytest.mark.parametrize("path", ["ratchet/training/loss.py", "ratchet/training/checkpoints.py"])
def test_what_only_the_training_runs_is_code_of_the_training_alone(tree, path):
    def change() -> None:
        text = (tree / path).read_text(encoding="utf-8")
        body = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)).body
        line = next(node for node in body if not isinstance(node, ast.Expr))
        lines = text.splitlines(keepends=True)
        lines.insert(line.lineno - 1, f"{' ' * line.col_offset}assert True\n")
        (tree / path).write_text("".join(lines), encoding="utf-8")

    assert changed(tree, change) == {"train"}


def test_a_template_of_the_judge_is_code_of_the_evaluation_and_not_of_the_training(tree):
    template = tree / "ratchet/llm/templates/judge_correctness.j2"
    found = changed(tree, lambda: edit(template, "---", "Be strict.\n---"))
    assert "evaluate" in found and not found & {"base", "prepare", "tokenize", "train", "answers"}


def test_the_page_that_prepare_renders_is_its_code(tree):
    page = tree / "ratchet/data/templates/profile.html"
    assert changed(tree, lambda: edit(page, "<section>", "<section><hr>")) == {"prepare"}


def test_scoring_is_code_of_the_evaluation_and_of_the_cached_answers(tree):
    found = changed(
        tree, lambda: edit(tree / "ratchet/evaluation/scoring.py", "\ndef ", "\nADDED = 1\n\n\ndef ")
    )
    assert {"evaluate", "answers"} <= found and "train" not in found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1", "x = 2"),
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = 'a'", "x = b'a'"),
        ("x = ['']", "x = []"),
        ("f(text='a')", "f(text='b')"),
        ("f(help=one)", "f(help=other)"),
        ("f(help=4)", "f(help=5)"),
        ("def f(*, a=None, b): ...", "def f(*, a, b=None): ..."),
        ("def f():\n    return", "def f():\n    return None"),
        ("if x:\n    f()\nelse:\n    pass", "if x:\n    pass\nelse:\n    f()"),
        ("x = f'{a!r}'", "x = f'{a!s}'"),
        ("x = f'{a:>3}'", "x = f'{a:>4}'"),
        ("x = {**a, b: c}", "x = {b: c, **a}"),
        ("x = None", "x: None"),
    ],
)
def test_other_code_is_another_key(tmp_path, one, other):
    write_files(tmp_path, {"ratchet/one.py": one})
    first = code_key(["ratchet/one.py"], tmp_path)
    write_files(tmp_path, {"ratchet/one.py": other})
    assert code_key(["ratchet/one.py"], tmp_path) != first


# What the parsers of Python 3.11, 3.12 and 3.13 say in different ways.
SOURCE = """
from __future__ import annotations
class One(Base, kind=u"x"):
    def two(self, a, /, b=None, *c: int, d=1, **e) -> str:
        return f"{a=} {b!r:>{c}} {{}}" "tail" f"{e:{'%d' if a else ''}}"
    async def three(self): return [x async for x in self if x is not ...]
try: one = lambda *a: {**a, None: 1.5e3j}
except* ValueError: raise
match one:
    case {"k": None, **rest}: del rest
"""


def test_every_python_gives_the_same_key(tmp_path):
    """Or a lock that one machine wrote would be stale on another."""
    write_files(tmp_path, {"ratchet/one.py": SOURCE})
    assert code_key(["ratchet/one.py"], tmp_path).startswith("e69e691690c2f5e8")


# --- with DVC itself ---

PIPELINE = """
stages:
  code:
    cmd: python -m ratchet.pipeline.dag --out data/code
    always_changed: true
    outs:
      - data/code:
          cache: false
  base:
    cmd: python -m tasks.base > base.txt
    deps: [data/code/base]
    outs: [base.txt]
  train:
    cmd: python -m tasks.train > train.txt
    deps: [data/code/train, base.txt]
    outs: [train.txt]
"""


def test_dvc_reruns_a_stage_when_its_code_changed_and_not_for_a_comment(tmp_path, monkeypatch):
    use_git_without_a_user(monkeypatch)
    needed = ("ratchet/pipeline/dag.py", "ratchet/files.py", "ratchet/errors.py")
    ours = {path: (ROOT / path).read_text(encoding="utf-8") for path in needed}
    mine = {
        "ratchet/loss.py": "LOSS = 1\n",
        "tasks/base.py": "print(1)\n",
        "tasks/train.py": "from ratchet.loss import LOSS\nprint(LOSS)\n",
        "dvc.yaml": PIPELINE,
        "data/.gitignore": "/code\n",
        ".gitignore": ".ratchet/\n__pycache__/\n",
    }
    root = make_repository(tmp_path / "checkout", {**ours, **mine})
    dvc(root, "repro", "--quiet")
    commit(root, "First run")
    with open_workspace(root, "test", lambda line: None) as workspace:
        check_out(workspace)
        loss = workspace.path / "ratchet/loss.py"
        loss.write_text('"""The loss."""\n\nLOSS = 1  # of one row\n')
        assert stale_stages(workspace) == set()
        loss.write_text("LOSS = 2\n")
        assert stale_stages(workspace) == {"train"}
        told = workspace.dvc("repro")
        assert "'base' didn't change" in told and (workspace.path / "train.txt").read_text() == "2\n"
