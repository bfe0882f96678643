"""What the sections of params.yaml share."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

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
    "regex_match",
    "numeric_match",
    "refusal",
    "length",
]
# Columns of a table of scores that no metric of one's own may have the name of.
TAKEN = frozenset(
    {
        *get_args(Metric),
        "id",
        "batch",
        "kind",
        "model",
        "question",
        "reference",
        "answer",
        "answer_nll",
        "answer_tokens",
        "prompt_nll",
        "region",
        "swap",
        "of",
        "planted",
        "handled",
        "withstood",
        "judge_correctness",
        "judge_groundedness",
        "judge_preference",
        "rows",
        "perplexity",
    }
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)
