"""Train in several processes: torchrun starts them, transformers' Trainer joins them in one optimisation.

`accelerate launch --cpu` runs a single process without an error, so the number of processes found is compared
with the number asked for.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ratchet.config.training import AdapterConfig, TrainConfig, why_whole
from ratchet.errors import ConfigError
from ratchet.files import whole_folder
from ratchet.models.loading import layers_of, without_adapter

TorchState = dict[str, Any]  # what `state_dict()` returns
# Of one node among several: node 0's HOST:PORT, the node's number, and the network interface between nodes.
RENDEZVOUS, NODE, INTERFACE = "RATCHET_RENDEZVOUS", "RATCHET_NODE", "RATCHET_INTERFACE"
CHUNK = 64 * 2**20  # bytes of a file that are sent at once


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def become_torchrun(train: TrainConfig, module: str, arguments: Sequence[str]) -> None:
    """Replace this process by torchrun, unless torchrun started this process.

    On several nodes `RENDEZVOUS` and `NODE` say where this one belongs. Raises ConfigError.
    """
    if "WORLD_SIZE" in os.environ:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // train.processes)))
    where = _one_of_several(train.nodes) if train.nodes > 1 else _alone()
    run = ["--nnodes", str(train.nodes), "--nproc-per-node", str(train.processes), *where]
    command = [sys.executable, "-m", "torch.distributed.run", *run, "-m", module, *arguments]
    os.execv(sys.executable, command)  # noqa: S606  (no shell is wanted)


def _alone() -> list[str]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]


def _one_of_several(nodes: int) -> list[str]:
    """Return torchrun's options for this node.

    The rendezvous is static, because otherwise rank 0, which writes the candidate, may be on any node.
    """
    rendezvous, node = os.environ.get(RENDEZVOUS, ""), os.environ.get(NODE, "")
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdigit() or not node.isdigit() or int(node) >= nodes:
        raise ConfigError(
            f"`train.nodes` is {nodes}; {RENDEZVOUS} is {rendezvous!r}, {NODE} is {node!r}",
            remedy=f"on each node set {RENDEZVOUS} to HOST:PORT of node 0, which the others reach, and "
            f"{NODE} to its number, 0 to {nodes - 1}; {INTERFACE} names the network interface where there "
            "are several",
        )
    if interface := os.environ.get(INTERFACE):
        os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return ["--node-rank", node, "--master-addr", host, "--master-port", port]


def end_with_parent() -> None:
    """End this process when torchrun is killed, so that it does not train on beside the next start."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_size(processes: int, found: int) -> None:
    """Raise ConfigError when the training runs in fewer or more processes than were asked for."""
    if processes != found:
        raise ConfigError(
            f"`train.processes` times `train.nodes` is {processes}, and {found} work on this training",
            remedy="start it by `ratchet retrain` or `python -m tasks.train`, or set `train.processes`",
        )


def take_gpu() -> None:
    """Select this process's GPU, so that nothing is loaded onto another's."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def in_parts(train: TrainConfig, adapter: AdapterConfig) -> bool:
    """Tell whether each of several processes keeps a part of the model (FSDP2) instead of all of it.

    Raises ConfigError: `train.parallel: fsdp` is not possible with these settings.
    """
    if train.world_size == 1 or train.parallel == "ddp":
        return False
    why = why_whole(train, adapter)
    if why and train.parallel == "fsdp":
        raise ConfigError(
            f"`train.parallel: fsdp` does not work here: {why}", remedy="set `train.parallel: ddp`"
        )
    return not why and (train.parallel == "fsdp" or adapter.method in ("full", "qlora"))


def any_of(flags: Sequence[bool]) -> list[bool]:
    """Return each flag as true if it is true in any process; all processes must call this together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(flags)
    told = torch.tensor(
        flags, dtype=torch.int32, device="cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    )
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in told.tolist()]


def connect() -> None:
    """Join the processes of all nodes, before the Trainer would."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leads_another_node() -> bool:
    """Return whether this is the first process of a node that is not node 0: it writes what node 0 sends."""
    return rank() > 0 and os.environ.get("LOCAL_RANK") == "0" and os.environ.get("GROUP_RANK") != "0"


def send_folder(source: Path | None, parent: Path) -> Path | None:
    """Copy rank 0's folder `source` into `parent` on each other node; return its place on this node.

    All processes call this together; `source` is None in all but the first, or everywhere if there is none.
    """
    listed = [[path.name, path.stat().st_size] for path in sorted(source.iterdir())] if source else []
    told = json.loads(_send_bytes(json.dumps([source.name if source else "", listed]).encode()))
    name, files = told
    if not name:
        return None
    target = source or parent / name
    writes = leads_another_node()
    with whole_folder(target) if writes else nullcontext(target) as folder:
        for file, size in files:
            with (folder / file).open("wb") if writes else nullcontext() as out:
                _send_file(source / file if source else None, size, out)
    torch.distributed.barrier()
    return target


def _send_file(source: Path | None, size: int, out: BinaryIO | None) -> None:
    with source.open("rb") if source else nullcontext() as file:
        for start in range(0, size, CHUNK):
            chunk = _send_bytes(file.read(CHUNK) if file else b"", min(CHUNK, size - start))
            if out:
                out.write(chunk)


def _send_bytes(data: bytes, size: int | None = None) -> bytes:
    """Return rank 0's `data` in each process; `size` is its length where all know it."""
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    if size is None:
        length = torch.tensor([len(data)], device=device)
        torch.distributed.broadcast(length, 0)
        size = int(length.item())
    held = torch.empty(size, dtype=torch.uint8, device=device)
    if rank() == 0:
        held = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    torch.distributed.broadcast(held, 0)
    return held.cpu().numpy().tobytes()


def shard(model: Any) -> None:
    """Shard `model` in place, layer by layer (FSDP2). The process group must exist already."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    # Without resharding, the root's weights stay whole after an evaluation, and would be read as a part.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    # With these two the Trainer neither moves the model nor wraps it in DDP, and sums gradients before it
    # exchanges them.
    without_adapter(model)._is_distributed_loading_by_transformers = True
    model._is_fsdp_managed_module = True


def local(weight: Tensor) -> Tensor:
    """Return this process's part of `weight`."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole(value: Any) -> Any:
    """Return `value` with whole tensors instead of parts; in all but the first process they are empty."""
    if isinstance(value, DTensor):
        found = value.full_tensor()
        return found.cpu() if rank() == 0 else torch.empty(0)
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    return [whole(part) for part in value] if isinstance(value, list) else value


def as_parts(held: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this process's parts `held`, cut as `weights` are, as DTensors that `whole` can join."""
    return {name: _part(tensor, weights[name]) for name, tensor in held.items()}


def _part(held: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(weight, DTensor):
        return held
    return DTensor.from_local(
        held.to(weight.device),
        weight.device_mesh,
        weight.placements,
        shape=weight.shape,
        stride=weight.stride(),
    )


def cut(tensors: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this process's part of each whole tensor, cut as its namesake in `weights` is."""
    return {name: local(_cut(tensor, weights[name])) for name, tensor in tensors.items()}


def cut_optimizer(state: TorchState, optimizer: torch.optim.Optimizer) -> TorchState:
    """Return a state of whole tensors as `optimizer` needs it: tensors of a weight's shape are cut."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def fit(value: Any, weight: Tensor) -> Any:
        return _cut(value, weight) if isinstance(value, Tensor) and value.shape == weight.shape else value

    return {
        **state,
        "state": {
            index: {name: fit(value, weights[index]) for name, value in kept.items()}
            for index, kept in state["state"].items()
        },
    }


def _cut(tensor: Tensor, like: Tensor) -> Tensor:
    # `src_data_rank=None`: each process has read the whole tensor, so none has to be sent.
    return (
        distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        if isinstance(like, DTensor)
        else tensor
    )
