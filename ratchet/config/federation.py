"""The section of params.yaml about training together without sharing rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ratchet.config.base import Count, Port, Section


class FederateConfig(Section):
    """Federated training: nodes train on rows that never leave them, the coordinator aggregates."""

    rounds: Count = Field(
        default=3,
        description="times that the global adapter goes out to the nodes, is trained there, and comes back; "
        "in each of them a node trains `train.epochs` passes over its own rows",
    )
    min_nodes: Count = Field(
        default=2,
        description="nodes that have to take part in a round; with fewer the training ends, and the champion "
        "stays",
    )
    strategy: Literal["fedavg", "fedadam", "trimmed_mean", "krum"] = Field(
        default="fedavg",
        description="how the nodes' updates become one: their mean, weighted by rows; Adam on that mean "
        "(arXiv 2003.00295); and against nodes that send poison: the mean of each weight without its "
        "extremes (arXiv 1803.01498), or the mean of the nodes whose updates have the nearest neighbours, "
        "all but `poisoned` of them (`krum`: Multi-Krum, arXiv 1703.02757)",
    )
    aggregation: Literal["exact", "alternate", "factors"] = Field(
        default="exact",
        description="what is averaged. `exact`: the updates B·A, with what two factors cannot hold of their "
        "mean kept beside them until the end; `alternate`: rounds train B and A in turn, so the mean of one "
        "factor is exact too (arXiv 2502.01755); `factors`: A and B apart, as is usual, which is another "
        "update than the nodes' mean",
    )
    secure: bool = Field(
        default=False,
        description="secure aggregation: the coordinator gets the sum of the updates and of the rows, no "
        "node's own; needs `aggregation: alternate`, `strategy: fedavg` and three nodes",
    )
    poisoned: int = Field(
        default=1,
        ge=0,
        description="nodes that may send anything: extremes left out on either side (`trimmed_mean`), or "
        "what `krum` is prepared for",
    )
    norm_limit: float = Field(
        default=10.0,
        gt=1,
        description="an update that is more than this many times as long as the median one is left out, and "
        "its node named; not with `secure`, where no single update is seen",
    )
    server_learning_rate: float = Field(
        default=1.0e-2, gt=0, description="learning rate of `fedadam` on the coordinator"
    )
    max_rank: int = Field(
        default=512,
        ge=1,
        le=512,
        description="highest rank of the adapter that comes out; what it has no room for is told",
    )
    round_minutes: float = Field(
        default=60.0, gt=0, description="minutes that a round waits for a node; later it goes on without it"
    )
    least_rows: Count = Field(
        default=20,
        description="held-out rows of a node below which it sends no sums of their scores: a sum over few "
        "rows would tell of single ones",
    )
    audit_canaries: int = Field(
        default=0,
        ge=0,
        le=20_000,
        description="invented rows at each node, each of which is trained on with probability one half; a "
        "node guesses from the version which were, and from the counts of all nodes the gate computes a "
        "lower bound of ε (docs/privacy.md); needs `train.privacy.epsilon`; 0: no audit",
    )
    host: str = Field(
        default="127.0.0.1",
        description="address on which nodes reach the coordinator, over TLS; `0.0.0.0` opens it to other "
        "machines",
    )
    port: Port = Field(default=8092, description="port of the same")
    superlink_port: Port = Field(default=8093, description="port of Flower's SuperLink, on loopback only")
    names: list[str] = Field(
        default=["127.0.0.1", "localhost"],
        min_length=1,
        description="host names and addresses by which nodes reach the coordinator; its certificate is for "
        "these, and the first stands in invitations",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> FederateConfig:
        if self.secure and self.aggregation != "alternate":
            raise ValueError(
                f"federate.secure is true, aggregation {self.aggregation!r}: the mean of products takes "
                "each node's own; set `federate.aggregation: alternate`"
            )
        if self.secure and self.strategy != "fedavg":
            raise ValueError(
                f"federate.secure is true and federate.strategy {self.strategy!r}, which the sum of the "
                "updates is not enough for; set `federate.strategy: fedavg`"
            )
        if self.secure and self.min_nodes < 3:  # of two, each knows the other's update from the sum
            raise ValueError(
                f"federate.secure is true and federate.min_nodes {self.min_nodes}: from the sum of two, each "
                "node knows the other's; set `federate.min_nodes: 3`"
            )
        if self.strategy == "fedadam" and self.aggregation == "exact":
            raise ValueError(
                "federate.strategy is 'fedadam', whose steps are on the factors; set `federate.aggregation: "
                "alternate`, or `factors`"
            )
        if self.strategy == "trimmed_mean" and self.aggregation == "exact":
            raise ValueError(
                "federate.strategy is 'trimmed_mean', which is taken of single weights; set "
                "`federate.aggregation: alternate`, where the other factor is common"
            )
        return self
