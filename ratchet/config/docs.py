"""Render docs/params.md and params.yaml from the models in ratchet/config/; a test keeps the three in step.

    python -m ratchet.config.docs             write docs/params.md
    python -m ratchet.config.docs --params    write params.yaml: the keys that people change, with defaults
    … --check                                write nothing; exit 1 when the file differs

Not covered: rules that relate two keys to each other; the messages of the validators state them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Collection, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ratchet.config.evaluation import MetricGuardrail
from ratchet.config.monitoring import TopicSource
from ratchet.config.params import Config
from ratchet.config.training import Place, SweepRange
from ratchet.files import write_text

DOC, PARAMS = Path("docs/params.md"), Path("params.yaml")
WIDTH, MAX_COLUMN = 110, 40  # width of params.yaml; the last column at which a comment begins
TYPES = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "`true`, `false`",
    "null": "`null`",
}
ENTRIES = (
    TopicSource,
    MetricGuardrail,
    SweepRange,
    Place,
)  # models of entries in lists and mappings
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
RESERVED = frozenset(
    {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
)  # YAML 1.1 reads these words as booleans or null, so they need quotes

# Keys that people change, and those that dvc.yaml names: DVC refuses to run a stage if one is missing.
SURVEYED = frozenset(
    {
        "project.name",
        "ingest.source",
        "ingest.licence",
        "ingest.jsonl.path",
        "base.model",
        "base.revision",
        "base.chat_template",
        "prepare.validation_share",
        "prepare.test_share",
        "prepare.near_duplicate",
        "prepare.extra_keys",
        "prepare.personal_data",
        "prepare.languages",
        "prepare.max_rejected_share",
        "prepare.min_rows",
        "tokenize.max_length",
        "tokenize.window",
        "train.objective",
        "train.start_from",
        "train.rows",
        "train.replay",
        "train.max_feedback_share",
        "train.epochs",
        "train.learning_rate",
        "train.batch_windows",
        "train.accumulate",
        "train.patience",
        "train.checkpoint_activations",
        "adapter.method",
        "adapter.quantisation",
        "adapter.rank",
        "adapter.alpha",
        "adapter.target_modules",
        "adapter.modules_to_save",
        "evaluate.max_new_tokens",
        "evaluate.batch_size",
        "evaluate.metrics",
        "evaluate.slices",
        "evaluate.canaries",
        "evaluate.audit_canaries",
        "parity.rows",
        "gate.metric",
        "gate.min_gain",
        "gate.alpha",
        "gate.min_rows",
        "gate.golden_margin",
        "gate.guardrails",
        "promotion",
        "retrain.cron",
        "retrain.on_data",
        "gateway.engine",
        "gateway.port",
        "gateway.host",
        "request_log.keep_days",
        "monitor.retrain",
        "monitor.false_alarm_rate",
        "monitor.min_new_rows",
        "rollout.steps",
        "rollout.min_users",
        "services.mlflow_port",
        "services.prefect_port",
    }
)

DOC_HEAD = """# Every key of params.yaml

Generated from `ratchet/config/` by `python -m ratchet.config.docs`. A key that is missing has its default; a
key that is not listed here is refused. Keys that were renamed: [renamed.md](renamed.md).
"""
PARAMS_HEAD = """# The settings that people change most often. Every key in docs/params.md can be set here too
# (`ratchet params --all` shows them). Stages read settings only from this file; after a change DVC runs only
# the stages that depend on it.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ratchet.config.docs",
        description="Write docs/params.md or params.yaml from the models in ratchet/config/.",
    )
    parser.add_argument(
        "--params",
        action="store_true",
        help="write params.yaml instead of docs/params.md: the keys that people change most often, each "
        "with its default",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file differs")
    options = parser.parse_args(arguments)
    path, text = (PARAMS, render_params(Config(), SURVEYED)) if options.params else (DOC, render())
    if not options.check:
        write_text(path, text)
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        sys.exit(
            f"{path} differs from ratchet/config/params.py; python -m "
            f"ratchet.config.docs{' --params' * options.params} writes it again"
        )


# --- docs/params.md ---


def render() -> str:
    """Render docs/params.md: one table per section, each nested section below its parent.

    A key at the top level gets a section of its own.
    """
    return DOC_HEAD + "".join(_doc_section(Config, ()))


def _doc_section(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[str]:
    if path:
        yield f"\n{'#' * (len(path) + 1)} {'.'.join(path)}\n{_lead(model)}\n"
    schemas, table_open = model.model_json_schema()["properties"], False
    for key, field in model.model_fields.items():
        if section := section_of(field.annotation):
            yield from _doc_section(section, (*path, key))
            table_open = False
            continue
        if not table_open or not path:
            heading = "" if path else f"\n## {key}\n"
            yield heading + "\n| key | takes | default | what it is |\n|---|---|---|---|\n"
            table_open = True
        yield (
            f"| `{'.'.join((*path, key))}` | {_cell(takes(schemas[key]))} | "
            f"{_cell(f'`{yaml_value(field.default)}`')} | {_cell(field.description or '')} |\n"
        )


def section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def takes(schema: dict[str, Any]) -> str:
    """Describe what a key's JSON schema allows: its type, then its bounds."""
    if "anyOf" in schema:
        return " or ".join(takes(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"`{{{', '.join(next(model for model in ENTRIES if model.__name__ == name).model_fields)}}}`"
    if schema["type"] == "object":
        return f"mapping of text to {takes(schema['additionalProperties'])}"
    if schema["type"] == "array":
        least = f", at least {schema['minItems']}" if "minItems" in schema else ""
        return f"list of {takes(schema['items'])}{least}"
    return ", ".join([TYPES[schema["type"]], *_bounds(schema)])


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    if "minimum" in schema and "maximum" in schema:
        yield f"{schema['minimum']:g}..{schema['maximum']:g}"
    else:
        signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        yield from (f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)
    if "multipleOf" in schema:
        yield f"a multiple of {schema['multipleOf']:g}"
    if schema.get("minLength"):
        yield "not empty"
    if "pattern" in schema:
        yield f"matching `{schema['pattern']}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _lead(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip()


# --- params.yaml ---


def render_params(values: Config, keys: Collection[str] | None = None) -> str:
    """Render `values` as params.yaml with descriptions as comments; `keys`: only these dotted keys.

    Parsers of YAML 1.1 and of YAML 1.2 read the same values from it.
    """
    return PARAMS_HEAD + "".join(_yaml_section(values, "", keys))


def _yaml_section(values: BaseModel, path: str, keys: Collection[str] | None) -> Iterator[str]:
    depth = path.count(".")
    indent = "  " * depth
    fields = {
        key: field
        for key, field in type(values).model_fields.items()
        if keys is None or any(f"{one}.".startswith(f"{path}{key}.") for one in keys)
    }
    pairs = {
        key: _pair(f"{indent}{key}:", getattr(values, key), f"\n{indent}  ")
        for key, field in fields.items()
        if not section_of(field.annotation)
    }
    heads = {key: pair.partition("\n")[0] for key, pair in pairs.items()}
    column = max((len(head) for head in heads.values() if len(head) <= MAX_COLUMN), default=0) + 2
    for key, field in fields.items():
        gap = "" if depth else "\n"
        if key in pairs:
            comment = "\n".join(_commented(heads[key], field.description or "", indent, column))
            yield gap + comment + pairs[key].removeprefix(heads[key]) + "\n"
        else:
            section: BaseModel = getattr(values, key)
            lead = (
                f"{gap}# {_lead(type(section))}\n{key}:\n"
                if not depth
                else f"{indent}{key}:  # {_lead(type(section))}\n"
            )
            yield lead + "".join(_yaml_section(section, f"{path}{key}.", keys))


def _pair(head: str, value: Any, newline: str) -> str:
    """Render a key and its value: a mapping, or a list too long for one line, with one entry per line."""
    if isinstance(value, dict) and value:
        return head + "".join(
            f"{newline}{yaml_value(key)}: {yaml_value(part)}" for key, part in value.items()
        )
    pair = f"{head} {yaml_value(value)}"
    if isinstance(value, list) and len(pair) > WIDTH:
        return head + "".join(f"{newline}- {yaml_value(part)}" for part in value)
    return pair


def _commented(head: str, comment: str, indent: str, column: int) -> Iterator[str]:
    """Put the comment after a line that ends before `column`, or above a longer line."""
    above = len(head) > column - 2
    room = WIDTH - 2 - (len(indent) if above else column)
    lines = textwrap.wrap(comment, room, break_long_words=False, break_on_hyphens=False) or [""]
    if above:
        yield from (f"{indent}# {line}" for line in lines)
        yield head
    else:
        yield from (f"{head if not row else '':<{column - 2}}  # {line}" for row, line in enumerate(lines))


def yaml_value(value: Any) -> str:
    """Write a scalar, a list of scalars or a mapping on one line."""
    if isinstance(value, BaseModel):
        return yaml_value(dict(value))
    if isinstance(value, dict):
        return f"{{{', '.join(f'{yaml_value(key)}: {yaml_value(part)}' for key, part in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_value, value))}]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in RESERVED else _quoted(value)
    if isinstance(value, float):
        return _yaml_float(value)
    return json.dumps(value)  # integers, true, false, null


def _quoted(text: str) -> str:
    # JSON escapes a character beyond U+FFFF as two surrogates, which YAML parsers do not join again.
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))


def _yaml_float(value: float) -> str:
    """Format a number so that YAML 1.1 reads it as a number: with a dot and a signed exponent.

    YAML 1.1 reads `2e-3` and `1e+16` as text.
    """
    if value == 0 or 0.01 <= abs(value) < 1e16:
        return repr(value)
    sign, digits, _ = Decimal(repr(value)).normalize().as_tuple()
    mantissa = f"{'-' * sign}{digits[0]}.{''.join(map(str, digits[1:])) or '0'}"
    return f"{mantissa}e{Decimal(repr(value)).adjusted():+d}"


if __name__ == "__main__":
    main()
