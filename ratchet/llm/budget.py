"""Limit the money and the tokens that a run may spend.

Before a request is sent, its highest possible cost is reserved, so that no limit can be exceeded.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple


class Usage(NamedTuple):
    """Numbers of input and output tokens."""

    input: int = 0
    output: int = 0

    def __add__(self, other: object) -> Usage:
        return (
            Usage(self.input + other[0], self.output + other[1])
            if isinstance(other, Usage)
            else NotImplemented
        )


class Prices(NamedTuple):
    """Prices of a million input and output tokens, in any one currency."""

    input: float = 0.0
    output: float = 0.0

    def cost(self, usage: Usage) -> float:
        return (usage.input * self.input + usage.output * self.output) / 1e6


class SpentError(Exception):
    """The next request could exceed a limit and was not sent; `limit` is the key in params.yaml."""

    def __init__(self, limit: str, message: str) -> None:
        super().__init__(message)
        self.limit = limit


class Budget:
    """The limits that all clients of a run share, and what they have used.

    `section` is the section of params.yaml that messages name.
    """

    def __init__(self, *, max_cost: float, max_tokens: int, section: str = "synthesize") -> None:
        self._section = section
        self._max_cost, self._max_tokens = max_cost, max_tokens
        self.cost, self.usage = 0.0, Usage()
        self._held: dict[int, tuple[float, int]] = {}
        self._changed = asyncio.Condition()
        self._next = 0

    async def hold(self, most: Usage, prices: Prices) -> int:
        """Reserve `most`, the highest usage of a request, and return a ticket for `settle`.

        Wait while requests in flight may still release enough of their reservations. Raises SpentError.
        """
        cost, tokens = prices.cost(most), sum(most)
        async with self._changed:
            while limit := self._passed(cost, tokens):
                if not self._held or self._passed(cost, tokens, held=False):
                    raise SpentError(limit, self._say(limit, cost, tokens))
                await self._changed.wait()
            self._next += 1
            self._held[self._next] = (cost, tokens)
            return self._next

    async def settle(self, ticket: int, used: Usage, prices: Prices) -> None:
        """Replace the reservation of a ticket by the usage."""
        async with self._changed:
            del self._held[ticket]
            self.cost += prices.cost(used)
            self.usage += used
            self._changed.notify_all()

    def _passed(self, cost: float, tokens: int, *, held: bool = True) -> str:
        """Return the limit that would be exceeded, or ""; `held`: count the reservations as well."""
        under_way = list(self._held.values()) if held else []
        if cost and self.cost + sum(part[0] for part in under_way) + cost > self._max_cost:
            return "max_cost"
        if sum(self.usage) + sum(part[1] for part in under_way) + tokens > self._max_tokens:
            return "max_run_tokens"
        return ""

    def _say(self, limit: str, cost: float, tokens: int) -> str:
        if limit == "max_cost":
            return (
                f"{self.cost:.4f} of {self._section}.max_cost ({self._max_cost:g}) is spent, "
                f"and the next request can cost up to {cost:.4f}"
            )
        return (
            f"{sum(self.usage)} of {self._section}.max_run_tokens ({self._max_tokens}) are spent, "
            f"and the next request can take up to {tokens}"
        )
