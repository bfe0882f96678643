"""Hand each message of a SuperNode to this node's own command, and send back what it writes.

Flower would run the app that the coordinator sends along. This loop does not load it: it takes the message,
and runs the command of its own checkout (RATCHET_NODE_COMMAND, JSON), which gets two paths: the request's,
and the reply's. So a coordinator can ask a node for what its checkout knows, and for nothing else.

It runs in Flower's own environment, as `python node_app.py ADDRESS`, beside a SuperNode that was started with
`--isolation process` and serves its API at ADDRESS.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

POLL = 0.5  # seconds between two questions for a message
FAILED = 1  # Flower's own errors have other codes, see relay.py
PROBE = b"here?"  # sent back as it came; see relay.py
TRIES = 3  # of a command that was killed: a training goes on from its checkpoint


def connect(address: str, token: str | None = None) -> RuntimeHttpClient:
    interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")]
    if token:
        interceptors.append(RuntimeTokenHttpInterceptor(token))
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # both are processes of one machine, on loopback
        root_certificates=None,
        interceptors=interceptors,
        retry_invoker=make_simple_http_retry_invoker(),
    )


def serve(address: str) -> None:
    """Answer each message in a thread: Flower waits over an hour for one that it dropped itself."""
    signal.signal(signal.SIGINT, lambda *_: None)  # Flower sends it to this process when a task is gone
    client = connect(address)
    while True:
        found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if found.HasField("task") and found.token:
            threading.Thread(target=answer, args=[address, found.token], daemon=True).start()
        time.sleep(POLL)


def answer(address: str, token: str) -> None:
    client = connect(address, token)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    context, status, details = None, SubStatus.FAILED, "the node's command failed"
    try:
        message, context, _, _ = pull_task_input(client)
        data, why = run(message.content["message"]["bytes"].numpy().tobytes())
        if data is None:
            reply = Message(Error(code=FAILED, reason=why), reply_to=message)
        else:
            record = ArrayRecord({"bytes": Array(np.frombuffer(data, np.uint8))})
            reply = Message(RecordDict({"message": record}), reply_to=message)
            status, details = SubStatus.COMPLETED, ""
        push_message(client, reply, context)
    finally:
        heartbeat.stop()
        push_task_output(client=client, context=context, sub_status=status, details=details)
        client.close()


def run(request: bytes) -> tuple[bytes | None, str]:
    """Return the reply of the node's command, or None and a reason without anything of its rows."""
    if request == PROBE:
        return PROBE, ""
    with tempfile.TemporaryDirectory(prefix="ratchet-node-") as scratch:
        asked, replied = Path(scratch) / "request", Path(scratch) / "reply"
        asked.write_bytes(request)
        command = [*json.loads(os.environ["RATCHET_NODE_COMMAND"]), str(asked), str(replied)]
        for _ in range(TRIES):
            code = subprocess.run(command, check=False).returncode
            if not code and replied.exists():
                return replied.read_bytes(), ""
        return None, f"the node's command ended {TRIES} times, with code {code}; its own log says why"


if __name__ == "__main__":
    serve(sys.argv[1])
