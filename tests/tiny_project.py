"""The settings of a small project whose retraining takes seconds, for tests that run the whole loop."""

from __future__ import annotations

from typing import Any

from ratchet.config.params import Config

TINY: dict[str, Any] = {
    "project": {"name": "colours"},
    "base": {
        "demo": {
            "packages": ["asyncio"],
            "module_share": 1.0,
            "hidden_size": 32,
            "layers": 1,
            "heads": 2,
            "vocab_size": 400,
            "steps": 20,
        }
    },
    "prepare": {"min_rows": 50},
    "tokenize": {"max_length": 128, "window": 256},
    "adapter": {"rank": 8, "alpha": 16},
    "evaluate": {"max_new_tokens": 6, "simple_baseline": False},
}
# So few rows prove little: what learned at all is promoted.
EASY = {
    "gate": {"metric": "answer_nll", "min_rows": 20, "golden_margin": 1.0, "past_margin": 1.0},
    "promotion": "auto",
}


def tiny_project(*, train: dict[str, Any], **sections: Any) -> Config:
    """Return the settings: `train` is added to batch and rate, `sections` take the place of whole ones."""
    train = {"batch_windows": 2, "learning_rate": 1.0e-2, **train}
    return Config.model_validate({**TINY, "train": train, **sections})
