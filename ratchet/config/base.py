"""The base class and the value types that the sections of params.yaml share."""

from __future__ import annotations

import sys
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
Metric = Literal[
    "exact_match",
    "token_f1",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "bleu",
    "chrf",
    "accuracy",
    "macro_f1",
    "json_valid",
    "json_fields",
    "regex_match",
    "numeric_match",
    "tool_decision",
    "tool_name",
    "tool_arguments",
    "refusal",
    "length",
    "preference",
]
PREFERENCE = "preference"  # the one metric that only some rows have: those with a worse answer
# Columns of the table of scores: a custom metric of the same name would overwrite its column.
TAKEN = frozenset(
    {
        *get_args(Metric),
        *("id", "batch", "kind", "model", "question", "reference", "answer", "rows", "region"),
        *("answer_nll", "answer_tokens", "prompt_nll", "perplexity"),
        *("swap", "of", "planted", "handled", "withstood"),
        *("judge_correctness", "judge_groundedness", "judge_preference"),
    }
)


class Section(BaseModel):
    """Base class of all sections: it refuses unknown keys, NaN and assignment.

    A renamed key is still read by its old name for one release.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)
    renamed: ClassVar[dict[str, str]] = {}  # old key → new key, both dotted as in params.yaml

    @model_validator(mode="before")
    @classmethod
    def _take_old_keys(cls, values: Any) -> Any:
        for old, new in cls.renamed.items():
            old_key, new_key = old.rpartition(".")[2], new.rpartition(".")[2]
            if not isinstance(values, dict) or old_key not in values:
                continue
            if new_key in values:
                raise ValueError(f"{old} is the old name of {new}, and both are set: keep {new} alone")
            _note_renamed(old, new)
            values = {new_key if key == old_key else key: value for key, value in values.items()}
        return values


@cache  # one note per process, although several modules read the file
def _note_renamed(old: str, new: str) -> None:
    sys.stderr.write(
        f"params.yaml: `{old}` is now `{new}`; the old name works for one more release (docs/renamed.md)\n"
    )
