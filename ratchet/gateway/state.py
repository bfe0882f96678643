"""The parts that the gateway's endpoints share, and the checks of who may use what."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from ratchet.config.params import Config
from ratchet.errors import ServiceError, UserError
from ratchet.gateway.auth import Doorkeeper, Key
from ratchet.gateway.identity import Ids
from ratchet.gateway.limits import Rate, Slots
from ratchet.gateway.metrics import Meters
from ratchet.gateway.routing import Choice, Fleet
from ratchet.monitoring.request_log import RequestLog
from ratchet.monitoring.request_records import Feedback
from ratchet.serving.engine import Engine
from ratchet.serving.faults import Fault

# What a container's or cluster's health checks ask, by an address that only they know. They tell no secret.
PROBES = ("/healthz", "/readyz")


@dataclass(frozen=True)
class Parts:
    """The objects that all endpoints of one gateway use."""

    root: Path
    config: Config
    engine: Engine
    fleet: Fleet
    log: RequestLog
    ids: Ids
    doorkeeper: Doorkeeper
    rate: Rate
    slots: Slots
    meters: Meters

    def admit(self, headers: Headers, scope: str) -> Key:
        """Return the caller's key. Raises Fault: 401, 403, or 429 for a key that asks too often."""
        key = self.doorkeeper.admit(headers.get("authorization", ""), scope)
        self.rate.take(key.name)
        return key

    def require_champion(self) -> int:
        """Return the version in charge. Raises Fault(503), with the reason, if there is none."""
        champion = self.fleet.table.champion
        if champion is None:
            raise Fault(
                503,
                self.fleet.table.why or "no champion is loaded",
                remedy="try again in a few seconds; `ratchet status` tells which version is in charge",
                code="not_ready",
                retry_after=5,
            )
        return champion

    def served(self) -> list[int]:
        table = self.fleet.table
        return [version for version in (table.champion, table.challenger) if version is not None]

    def models(self) -> list[str]:
        """Return the names that a client may see: the project's, and one for each version that is served."""
        name = self.config.project.name
        return [name, *(f"{name}@v{version}" for version in self.served())]

    def require_model(self, model: str) -> None:
        """Raise Fault(404) for a name that no model has."""
        if model not in self.models():
            raise Fault(
                404,
                f"the model {model[:80]!r} does not exist",
                remedy=f"ask for {self.config.project.name!r}",
                param="model",
                code="model_not_found",
            )

    async def remember(self, feedback: Feedback) -> None:
        """Store the feedback, in a thread, since the database may be slow.

        Raises Fault: 409 when another key has sent feedback for that user, 503 when the log is down.
        """
        try:
            await run_in_threadpool(self.log.add_feedback, feedback)
        except UserError as error:
            raise Fault(409, str(error), param="request_id", code="feedback_exists") from None
        except ServiceError as error:
            raise Fault(503, str(error), code="log_is_down", retry_after=5) from None

    def choose(self, model: str, unit: str, key: Key) -> Choice:
        """Choose the version that answers.

        An admin may name a version; such a request belongs to no arm. Raises Fault (404, 403, 503).
        """
        name = self.config.project.name
        if model == name:
            self.require_champion()
            return self.fleet.choose(unit)
        self.require_model(model)
        if not key.may_choose_version:
            raise Fault(
                403,
                f"{model} cannot be chosen: which version answers is up to the rollout",
                remedy=f"ask for {name!r}, or send a key with the scope admin",
                param="model",
                code="missing_scope",
            )
        return Choice(int(model.rpartition("@v")[2]), "named", "", -1)


def gather_parts(root: Path, config: Config, engine: Engine, fleet: Fleet, log: RequestLog) -> Parts:
    gateway = config.gateway
    meters, slots = Meters(), Slots(gateway.max_batch + gateway.max_queue)
    meters.show("ratchet_under_way", "Answers under way, the waiting ones included", lambda: slots.held)
    meters.show(
        "ratchet_log_waiting", "Requests that wait to be written to the log", lambda: log.counts().waiting
    )
    meters.show(
        "ratchet_log_dropped",
        "Requests that the log could not take, since the start",
        lambda: log.counts().dropped,
    )
    return Parts(
        root=root,
        config=config,
        engine=engine,
        fleet=fleet,
        log=log,
        ids=Ids(root),
        doorkeeper=Doorkeeper(root, required=not is_loopback(gateway.host)),
        rate=Rate(gateway.requests_per_minute),
        slots=slots,
        meters=meters,
    )


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
