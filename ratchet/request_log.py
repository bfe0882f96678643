"""What the gateway remembers: requests and people's feedback on them, in SQLite or any database that SQLAlchemy reaches."""

from __future__ import annotations

import msgspec


class Logged(msgspec.Struct, frozen=True):
    """One request. Times in seconds since 1970 or milliseconds; NLL in nats a token. `user` is a pseudonym, empty where the client named none."""

    id: str
    at: float
    user: str
    arm: str  # "champion" or "challenger"
    version: int
    rollout: str = ""  # id of the rollout that chose the arm
    step: int = -1
    messages: tuple[tuple[str, str], ...] = ()  # (role, content), redacted; empty where texts are not kept
    answer: str = ""
    finish: str = ""  # "stop", "length", "error", "cancelled"
    status: int = 200  # HTTP status
    error: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    latency_ms: float = 0.0
    first_ms: float = 0.0  # until the first piece of the answer
    queue_ms: float = 0.0
    prompt_nll: float | None = None
    answer_nll: float | None = None

    @property
    def prompt(self) -> str:
        """The last user turn."""
        return next((content for role, content in reversed(self.messages) if role == "user"), "")


class Feedback(msgspec.Struct, frozen=True):
    """What one person said of one answer. `score` from 0 (wrong) to 1 (right)."""

    request: str
    user: str
    at: float
    score: float | None = None
    label: str = ""
    answer: str = ""  # the corrected answer
    comment: str = ""
