"""Send the project's events through Prefect, where they start flows."""

from __future__ import annotations

import re
from typing import Any

from ratchet.config.params import Config

COMMITTED, DRIFTED = "ratchet.data.committed", "ratchet.drift.detected"


def resource_of(config: Config) -> str:
    """Name the project as the event's resource, so that two projects on one server stay separate."""
    return f"ratchet.project.{config.project.name}"


def artifact_key(config: Config, name: str) -> str:
    """Return the key of the project's artifact; Prefect allows lower-case letters, digits and dashes."""
    return f"{re.sub('[^a-z0-9]', '-', config.project.name)}-{name}"


def tell(event: str, config: Config, payload: dict[str, Any]) -> None:
    """Send an event to Prefect's server, which delivers it to the automations of `flows/deployments.py`.

    Without a server the event is lost.
    """
    from prefect.events import emit_event

    emit_event(
        event=event,
        resource={"prefect.resource.id": resource_of(config), "prefect.resource.name": config.project.name},
        payload=payload,
    )
