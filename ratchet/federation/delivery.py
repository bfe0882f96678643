"""Give the version that came out of a federation to its nodes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from ratchet.errors import DataError
from ratchet.federation import messages
from ratchet.federation.messages import write_message
from ratchet.federation.node import identity
from ratchet.federation.rounds import Link, Say, ask_each
from ratchet.files import read_json
from ratchet.models.loading import MANIFEST, WEIGHTS
from ratchet.models.manifests import read_trained_manifest


def deliver(
    link: Link, candidate: Path, base: Path, version: int | None, seconds: float, say: Say
) -> dict[str, str]:
    """Send the version in `candidate` to the nodes that are connected; return who has not got it, and why.

    Nodes that took part in its training and are away are among them. Raises ServiceError: the link to the
    nodes does not run.
    """
    manifest = read_trained_manifest(candidate)
    if manifest.federation is None or manifest.max_length is None:
        raise DataError(f"{candidate} was not trained by a federation")
    run = manifest.federation.run
    asked = messages.Deliver(
        run=run,
        version=version,
        base=identity(base),
        adapter_config=read_json(candidate / "adapter_config.json"),
        record=read_json(candidate / MANIFEST)["adapter"],
        max_length=manifest.max_length,
        start=manifest.inputs.start,
        federation=manifest.federation,
    )
    nodes, request = link.nodes(), write_message(asked, load_file(candidate / WEIGHTS))
    read = partial(messages.read_answer, kind=messages.Delivered)
    _, refused = ask_each(link, nodes, request, seconds, f"{run}-deliver", read)
    away = {name: "it is away" for name in manifest.federation.nodes if name not in nodes.values()}
    without = away | refused
    given = sorted(set(nodes.values()) - without.keys())
    say(f"federate: the version is delivered to {', '.join(given) or 'no node'}")
    for name, why in without.items():
        say(f"federate: {name} has not got it: {why}; the next version that passes the gate goes out again")
    return without
