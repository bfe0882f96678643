"""An example of metrics of your own.

`evaluate.custom: ["my_metrics:legal_term_recall"]` in params.yaml turns it on.
"""

from __future__ import annotations

import re
from typing import Any

TERMS = {"liability", "indemnity", "warranty", "termination", "jurisdiction"}


def legal_term_recall(prediction: str, reference: str, example_meta: dict[str, Any]) -> float:
    """Share of the reference's legal terms that the prediction holds too; 1 when the reference has none.

    A row's own `terms` (with commas) come on top.
    """
    terms = TERMS | {
        term.strip().lower() for term in str(example_meta.get("terms") or "").split(",") if term.strip()
    }
    wanted = terms & set(re.findall(r"\w+", reference.lower()))
    found = wanted & set(re.findall(r"\w+", prediction.lower()))
    return len(found) / len(wanted) if wanted else 1.0
