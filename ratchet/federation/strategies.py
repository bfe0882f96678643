"""Turn what the nodes of a round learned into the next global adapter.

A strategy is a rule without memory of its own: what it keeps from round to round is a dict of tensors, which
the coordinator saves as safetensors beside the adapter. All adapters of a round share a base and a shape, and
their updates count from the same start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ratchet.errors import ConfigError, DataError, UserError
from ratchet.federation.aggregation import (
    Adapter,
    Aggregate,
    krum_order,
    mean_exactly,
    mean_of_weights,
    trimmed_mean,
)

State = Mapping[str, Tensor]  # of a strategy, float32; empty before the first round
StrategyName = Literal["fedavg", "fedadam", "trimmed_mean", "krum"]


class Round(NamedTuple):
    """The outcome of a round: the new global adapter, and the state for the next round.

    The aggregate's residual is what this round's mean update has beyond the product of the new factors; it is
    added to the base, or folded into the adapter, before the next round (`ratchet.federation.aggregation`).
    """

    aggregate: Aggregate
    state: dict[str, Tensor]


class Strategy(Protocol):
    """A rule that makes one adapter out of the adapters of a round."""

    @property
    def least_nodes(self) -> int:
        """The nodes without which a round has no outcome."""

    def combine(
        self, before: Adapter, adapters: Sequence[Adapter], weights: Sequence[float], state: State
    ) -> Round:
        """Combine the adapters that nodes trained from `before`; `weights` are their numbers of rows.

        Raises UserError: there are fewer than `least_nodes`, or the weights have no mean; DataError: a node's
        adapter has other tensors, or one that is not finite, or the state is of another adapter.
        """


class FedAvg(NamedTuple):
    """The weighted mean of the nodes (arXiv 1602.05629).

    With `exact` it is the mean of the updates B·A (arXiv 2410.09432); otherwise A and B are averaged apart,
    as is usual, which gives another update than the nodes' mean. FedProx (arXiv 1812.06127) is the same
    here: its nodes train with `train.proximal`.
    """

    exact: bool = True
    least_nodes: int = 1

    def combine(
        self, before: Adapter, adapters: Sequence[Adapter], weights: Sequence[float], state: State
    ) -> Round:
        check_round(self.least_nodes, before, adapters, weights)
        if self.exact:
            return Round(mean_exactly(adapters, weights), {})
        return Round(Aggregate(mean_of_weights(adapters, weights), {}), {})


class FedAdam(NamedTuple):
    """Adam at the coordinator, on the nodes' mean difference of each weight (arXiv 2003.00295).

    The names are those of the paper's algorithm 2, without a correction of the first steps, as there. Factors
    are moved apart, so the outcome has no residual.
    """

    learning_rate: float = 1e-2  # how far a weight moves in a round, about
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3  # differences far below this one move a weight less
    least_nodes: int = 1

    def combine(
        self, before: Adapter, adapters: Sequence[Adapter], weights: Sequence[float], state: State
    ) -> Round:
        check_round(self.least_nodes, before, adapters, weights)
        mean = mean_of_weights(adapters, weights)
        adapter: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for name, weight in before.items():
            start = weight.double()
            moved = mean[name].double() - start
            first = self._kept(state, f"first/{name}", torch.zeros_like(start))
            second = self._kept(state, f"second/{name}", torch.full_like(start, self.tau**2))
            first = self.beta_1 * first + (1 - self.beta_1) * moved
            second = self.beta_2 * second + (1 - self.beta_2) * moved.square()
            adapter[name] = (start + self.learning_rate * first / (second.sqrt() + self.tau)).to(weight.dtype)
            kept |= {f"first/{name}": first.float(), f"second/{name}": second.float()}
        return Round(Aggregate(adapter, {}), kept)

    @staticmethod
    def _kept(state: State, key: str, otherwise: Tensor) -> Tensor:
        if not state:
            return otherwise
        if key not in state or state[key].shape != otherwise.shape:
            seen = list(state[key].shape) if key in state else "none"
            raise DataError(
                f"the coordinator's state holds {seen} for {key}, wanted {list(otherwise.shape)}",
                remedy="it is of another adapter: remove the state, and the rounds begin anew",
            )
        return state[key].double()


class TrimmedMean(NamedTuple):
    """The mean of each weight without its outermost values on either side (arXiv 1803.01498).

    Nodes count alike, since one that sends poison could name any number of rows.
    """

    outermost: int = 1  # nodes that may send anything

    @property
    def least_nodes(self) -> int:
        return 2 * self.outermost + 1

    def combine(
        self, before: Adapter, adapters: Sequence[Adapter], weights: Sequence[float], state: State
    ) -> Round:
        check_round(self.least_nodes, before, adapters, weights)
        return Round(Aggregate(trimmed_mean(adapters, self.outermost), {}), {})


class Krum(NamedTuple):
    """The exact mean of the nodes whose updates have the nearest neighbours (arXiv 1703.02757).

    `kept` nodes: 1 is Krum itself, which learns from one node's rows in a round; more of them are Multi-Krum,
    at most as many as are not poisoned, which None takes. Nodes count alike, as with the trimmed mean.
    """

    poisoned: int = 1  # nodes that may send anything
    kept: int | None = 1

    @property
    def least_nodes(self) -> int:
        return max(2 * self.poisoned + 3, self.poisoned + (self.kept or 1))

    def combine(
        self, before: Adapter, adapters: Sequence[Adapter], weights: Sequence[float], state: State
    ) -> Round:
        check_round(self.least_nodes, before, adapters, weights)
        kept = self.kept or len(adapters) - self.poisoned
        chosen = krum_order(adapters, self.poisoned)[:kept]
        return Round(mean_exactly([adapters[node] for node in chosen], [1.0] * kept), {})


def make_strategy(
    name: StrategyName,
    *,
    exact: bool = True,
    poisoned: int = 1,
    kept: int | None = None,
    learning_rate: float = 1e-2,
) -> Strategy:
    """Return the strategy of a name.

    `exact` is for `fedavg`, `learning_rate` for `fedadam`, `poisoned` for those that bear poison.

    `kept` nodes make the mean of `krum`: all but those by default. Raises ConfigError: none has this name.
    """
    if name == "fedavg":
        return FedAvg(exact=exact)
    found: dict[str, Strategy] = {
        "fedadam": FedAdam(learning_rate),
        "trimmed_mean": TrimmedMean(poisoned),
        "krum": Krum(poisoned, kept),
    }
    if name not in found:
        raise ConfigError(
            f"the strategy {name!r} is unknown", remedy=f"take one of fedavg, {', '.join(sorted(found))}"
        )
    return found[name]


def check_round(least: int, before: Adapter, adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    """Raise UserError for too few nodes, DataError for an adapter that is not like the one before."""
    if len(adapters) < least or len(adapters) != len(weights):
        raise UserError(
            f"{len(adapters)} nodes took part, with {len(weights)} weights; wanted at least {least} nodes, "
            "and a weight for each",
            remedy="wait for more nodes, or take a strategy that needs fewer",
        )
    for number, adapter in enumerate(adapters):
        if odd := sorted(before.keys() ^ adapter.keys()):
            where = "lacks" if odd[0] in before else "has besides"
            raise DataError(
                f"the adapter of node {number} of {len(adapters)} {where} {odd[0]}",
                remedy="it was trained with other settings: every node takes `adapter` from the coordinator",
            )
        for name, weight in before.items():
            seen = adapter[name]
            if seen.shape != weight.shape or not bool(torch.isfinite(seen).all()):
                fault = "values that are not finite" if seen.shape == weight.shape else list(seen.shape)
                raise DataError(
                    f"{name} of node {number} of {len(adapters)} holds {fault}, wanted {list(weight.shape)}",
                    remedy="leave the node out of this round; its training diverged, or has other settings",
                )
