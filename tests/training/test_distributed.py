"""Several processes of one training: what one alone would have learned."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from patience import scaled
from pydantic import ValidationError
from safetensors.torch import load_file

from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, TrainConfig
from ratchet.errors import ConfigError
from ratchet.files import read_json, sha256_file
from ratchet.pipeline.dvc import without_torchrun
from ratchet.services.processes import free_port
from ratchet.tracking.curve import read_history
from ratchet.training.distributed import become_torchrun, check_size, in_parts
from ratchet.training.launch import Ended

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
    "--tokens",
    "data/tokenized",
    "--base",
    "models/base",
    "--incumbent",
    "models/incumbent",
    "--out",
    "models/candidate",
    "--reports",
    "reports/train",
]


def start(
    folder: Path, tokens: Path, base: Path, nobody: Path, config: Config, **variables: str
) -> subprocess.Popen[str]:
    for source, place in ((tokens, "data/tokenized"), (base, "models/base"), (nobody, "models/incumbent")):
        shutil.copytree(source, folder / place, dirs_exist_ok=True)
    (folder / "params.yaml").write_text(render_params(config))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RATCHET_ROOT": str(folder),
        **variables,
    }
    command = [sys.executable, "-m", "tasks.train", *ARGUMENTS]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def with_processes(config: Config, processes: int, method: str, parallel: str = "auto") -> Config:
    train = config.train.model_copy(
        update={
            "processes": processes,
            "parallel": parallel,
            "accumulate": 2,
            "batch_windows": 1,
            "precision": "float32",
            "epochs": 1.0,
        }
    )
    if method == "full":  # with LoRA's rate it leaps, and a leap makes much of the last bit
        train = train.model_copy(update={"learning_rate": 5e-4})
    return config.model_copy(
        update={"train": train, "adapter": config.adapter.model_copy(update={"method": method})}
    )


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(method, marks=pytest.mark.e2e) for method in ("full", "qlora"))]
)
def test_two_processes_learn_what_one_does(tmp_path, tokens, tiny_base, nobody, tiny_config, method):
    """The same global batch: losses within 1e-4, on gloo."""
    started = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        started.append(
            (folder, start(folder, tokens, tiny_base, nobody, with_processes(tiny_config, processes, method)))
        )
    curves, weights = [], []
    for folder, process in started:
        said, error = process.communicate()
        assert process.returncode == 0, error
        assert said.count("best validation loss") == 1  # one process tells and writes
        assert ("2 processes, each with a part of the model" in said) == (
            folder.name == "2" and method != "lora"
        )
        curves.append(read_history(folder / "reports/train/history.jsonl"))
        weights.append(load_file(next((folder / "models/candidate").glob("*model.safetensors"))))
        assert not list(folder.rglob(".*.tmp"))
    alone, together = curves
    assert len(alone) > 3
    assert [point["step"] for point in alone] == [point["step"] for point in together]
    for left, right in zip(alone, together, strict=True):
        assert left.keys() == right.keys()
        assert {name: value for name, value in left.items() if "loss" in name} == pytest.approx(
            {name: value for name, value in right.items() if "loss" in name},
            abs=1e-4 if method != "qlora" else 5e-3,
        )
    if method != "qlora":
        for name, weight in weights[0].items():
            torch.testing.assert_close(weights[1][name], weight, rtol=1e-2, atol=1e-3, msg=name)
    assert (
        read_json(started[0][0] / "models/candidate/manifest.json")["run_key"]
        != read_json(started[1][0] / "models/candidate/manifest.json")["run_key"]
    )


PARTS = """
import torch
from ratchet.config.training import AdapterConfig
from ratchet.models.adapters import load_trainable
from ratchet.training.distributed import as_parts, cut, cut_optimizer, local, rank, shard, whole
from ratchet.training.state import trainable
from pathlib import Path
import sys

torch.distributed.init_process_group("gloo")
model = load_trainable(Path(sys.argv[1]), None, AdapterConfig(method="qlora", rank=4), seed=1, in_parts=True)
before = {name: weight.clone() for name, weight in trainable(model).items()}
every = sum(weight.numel() for weight in model.parameters())
shard(model)
held = sum(local(weight).numel() for weight in model.parameters())
ids = torch.arange(24).reshape(2, 12)
trained = [weight for weight in model.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
weights = trainable(model)
mine = {name: local(weight).clone() for name, weight in weights.items()}
gathered, again, state = whole(weights), whole(as_parts(mine, weights)), whole(optimizer.state_dict())
same = rank() > 0 or all(
    torch.equal(gathered[name], before[name]) and torch.equal(again[name], before[name]) for name in before
)
cutting = all(torch.equal(part, mine[name]) for name, part in cut(before, weights).items())
both = [gathered if rank() == 0 else None, state if rank() == 0 else None]
torch.distributed.broadcast_object_list(both)
moments = local(optimizer.state_dict()["state"][1]["exp_avg"])  # of a B: an A has no gradient yet
loaded = local(cut_optimizer(both[1], optimizer)["state"][1]["exp_avg"])
moved = bool(moments.abs().sum() > 0)
found = (same, cutting, torch.equal(loaded, moments), moved)
Path(sys.argv[2], f"rank-{rank()}").write_text(" ".join(map(str, (f"{held / every:.2f}", *found))))
torch.distributed.destroy_process_group()
"""


@pytest.mark.e2e
def test_each_process_holds_a_part_and_the_whole_comes_back(tmp_path, tiny_base):
    script = tmp_path / "parts.py"
    script.write_text(PARTS)
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "--local-addr",
        "127.0.0.1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*run, str(script), str(tiny_base), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=scaled(100),
    )
    assert done.returncode == 0, done.stderr
    # Each process has a file of its own: lines of two processes can run together in one output.
    for process in (0, 1):
        assert (tmp_path / f"rank-{process}").read_text() == "0.50 True True True True", process


@pytest.mark.e2e
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_training_in_parts_that_is_killed_ends_in_the_same_bytes(
    tmp_path, tokens, tiny_base, nobody, tiny_config, method
):
    config = with_processes(tiny_config, 2, method)
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"checkpoint_minutes": 0.0, "epochs": 0.5})}
    )
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    process = start(tmp_path / "killed", tokens, tiny_base, nobody, config)
    while not list((tmp_path / "killed").glob(".ratchet/checkpoints/*/step-0000001*/manifest.json")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()  # torchrun alone
    process.communicate()  # ends when all have closed it
    assert not (tmp_path / "killed/models/candidate").exists()
    said = []
    for name in ("killed", "whole"):
        process = start(tmp_path / name, tokens, tiny_base, nobody, config)
        said.append(process.communicate()[0])
        assert process.returncode == 0
    assert "goes on from the checkpoint of step 1" in said[0] and "goes on" not in said[1]
    assert sums(tmp_path / "killed") == sums(tmp_path / "whole")


def on_nodes(config: Config, nodes: int, **changes: object) -> Config:
    config = with_processes(config, 1, "lora")
    train = {"nodes": nodes, "epochs": 0.5, "checkpoint_minutes": 0.0, **changes}
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def start_nodes(folders: list[Path], *inputs: Path, config: Config) -> list[subprocess.Popen[str]]:
    """Start torchrun once a folder, each with a checkout of its own; they meet on loopback."""
    rendezvous = f"127.0.0.1:{free_port()}"
    return [
        start(
            folder,
            *inputs,
            config,
            RATCHET_RENDEZVOUS=rendezvous,
            RATCHET_NODE=str(number),
            RATCHET_INTERFACE="lo",
        )
        for number, folder in enumerate(folders)
    ]


def sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in (folder / "models/candidate").iterdir()}


SENT = """
import sys, torch
from pathlib import Path
from ratchet.errors import ConfigError
from ratchet.files import write_text
from ratchet.training import distributed
from ratchet.training.checkpoints import Checkpoints

distributed.CHUNK = 1000
node, home = distributed.rank(), Path(sys.argv[1])

def checkpoints(**facts):
    return Checkpoints(home, "key", {"seed": 1, **facts}, minutes=0.0, curve=list)

found = [checkpoints().newest_on_all_nodes(lambda points: None)]
if node == 0:
    state = {"weights": {"a": torch.arange(3000.0)}, "seconds": 2.5}
    checkpoints().write(7, state, lambda name: write_text(Path(name), "{}"))
found.append(checkpoints().newest_on_all_nodes(lambda points: None))
same = torch.equal(found[1].state["weights"]["a"], torch.arange(3000.0)) and found[1].step == 7
try:
    checkpoints(**({"torch": "another"} if node else {})).newest_on_all_nodes(lambda points: None)
    refused = ""
except ConfigError as error:
    refused = str(error)
Path(sys.argv[1], "found").write_text(f"{found[0]} {same} {found[1].folder.is_relative_to(home)} {refused}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.e2e
def test_each_node_has_the_checkpoint_of_node_0_or_all_refuse(tmp_path):
    """Two torchruns on loopback, each with a folder of its own."""
    script = tmp_path / "sent.py"
    script.write_text(SENT)
    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    nodes = []
    for number in ("0", "1"):
        (tmp_path / number).mkdir()
        where = ["--node-rank", number, "--master-addr", "127.0.0.1", "--master-port", port]
        run = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *where]
        command = [sys.executable, "-m", *run, str(script), str(tmp_path / number)]
        nodes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [node.communicate(timeout=scaled(100))[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    for number in ("0", "1"):
        found = (tmp_path / number / "found").read_text()
        assert found.startswith("None True True a node cannot go on from the checkpoint of node 0"), number
    assert "torch was None, is another" in said[1], "the node says which of its facts differs"


@pytest.mark.e2e
def test_nodes_go_on_from_the_checkpoint_of_node_0_and_another_number_of_nodes_begins_anew(
    tmp_path, tokens, tiny_base, nobody, tiny_config
):
    """Two machines, of which the second has lost its disk; then one, which says why it cannot go on."""
    inputs, config = (tokens, tiny_base, nobody), on_nodes(tiny_config, 2)
    folders = [tmp_path / name for name in ("node 0", "node 1", "node 1 again", "whole 0", "whole 1")]
    for folder in folders:
        folder.mkdir()
    killed = start_nodes(folders[:2], *inputs, config=config)
    while not list(folders[0].glob(".ratchet/checkpoints/*/step-0000001*/manifest.json")):
        assert killed[0].poll() is None, killed[0].communicate()[1]
        time.sleep(0.01)
    for process in killed:
        process.kill()
    for process in killed:
        process.communicate()
    assert not (folders[0] / "models/candidate").exists()
    assert not list(folders[1].glob(".ratchet/checkpoints/*")), "only node 0 writes"
    shutil.copytree(folders[0], tmp_path / "alone")
    for nodes in (folders[0:3:2], folders[3:5]):
        processes = start_nodes(nodes, *inputs, config=config)
        said = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
        assert ("goes on from the checkpoint of step 1" in said[0][0]) == (nodes[0] == folders[0])
        assert "2 processes on 2 nodes" in said[0][0]
        assert not (nodes[1] / "models/candidate").exists()
        assert not list(nodes[1].glob(".ratchet/checkpoints/*")), "what was sent is gone with the success"
    assert sums(folders[0]) == sums(folders[3])
    process = start(tmp_path / "alone", *inputs, on_nodes(tiny_config, 1))
    told = process.communicate()[0]
    assert process.returncode == 0
    assert "from the start" in told and "train.nodes 2 → 1" in told


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({}, r"`train.nodes` is 2; RATCHET_RENDEZVOUS is ''"),
        ({"RATCHET_RENDEZVOUS": "hub:29500"}, r"RATCHET_NODE is ''"),
        ({"RATCHET_RENDEZVOUS": "hub:29500", "RATCHET_NODE": "2"}, r"its number, 0 to 1"),
        ({"RATCHET_RENDEZVOUS": "hub", "RATCHET_NODE": "1"}, r"HOST:PORT of node 0"),
    ],
)
def test_a_node_that_does_not_know_its_place_is_refused(monkeypatch, variables, seen):
    for name in ("RATCHET_RENDEZVOUS", "RATCHET_NODE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=seen):
        become_torchrun(TrainConfig(nodes=2, accumulate=2), "tasks.train", [])


@pytest.mark.parametrize(
    ("adapter", "train", "parts"),
    [
        ({"method": "lora"}, {}, False),
        ({"method": "full"}, {}, True),
        ({"method": "qlora"}, {}, True),
        ({"method": "qlora", "quantisation": "int8"}, {}, False),
        ({"method": "full"}, {"parallel": "ddp"}, False),
        ({"method": "lora"}, {"parallel": "fsdp"}, True),
        ({"method": "full"}, {"optimizer": "adafactor"}, False),
        ({"method": "full"}, {"processes": 1, "parallel": "fsdp"}, False),
    ],
)
def test_what_is_kept_in_parts(adapter, train, parts):
    assert (
        in_parts(TrainConfig(**{"processes": 2, "accumulate": 2, **train}), AdapterConfig(**adapter)) is parts
    )


@pytest.mark.parametrize(
    ("adapter", "train", "seen"),
    [
        ({"method": "prefix"}, {}, "prefix"),
        ({"method": "qlora", "quantisation": "int8"}, {}, "int8"),
        ({"method": "full"}, {"optimizer": "adamw_8bit"}, "adamw_8bit"),
    ],
)
def test_what_cannot_be_cut_is_refused(adapter, train, seen):
    with pytest.raises(ConfigError, match=seen):
        in_parts(TrainConfig(processes=2, accumulate=2, parallel="fsdp", **train), AdapterConfig(**adapter))


def test_what_cannot_be_cut_is_refused_with_params_yaml():
    """Before torchrun starts, whose report would bury the reason."""
    with pytest.raises(ValidationError, match=r"train\.parallel is 'fsdp': `adapter\.method: prefix`"):
        Config.model_validate(
            {"train": {"processes": 2, "accumulate": 2, "parallel": "fsdp"}, "adapter": {"method": "prefix"}}
        )


def test_of_torchruns_report_only_what_the_process_said_is_told():
    report = (
        "E1126 05:05:26.555000 28172 torch/distributed/elastic/multiprocessing/api.py:1002] failed"
        " (exitcode: 2) local_rank: 0 (pid: 28179)"
    )
    said = [
        "train: …",
        "ConfigError: no",
        "  → do this",
        report,
        "Traceback",
        "torch.distributed.ChildFailedError:",
    ]
    assert Ended(1, 1.0, False, without_torchrun(said)).reason == "ConfigError: no → do this"
    assert without_torchrun(said) == said[:3]
    assert without_torchrun(said[:3]) == said[:3]
    fault = [
        "[rank0]: Traceback (most recent call last):",
        '[rank0]:   File "torch/distributed/tensor/_api.py", line 774',
        "[rank0]: RuntimeError: boom",
    ]
    assert without_torchrun([*fault, report, "ChildFailedError:"]) == fault


def test_fewer_processes_than_asked_for_are_no_training():
    with pytest.raises(ConfigError, match=r"`train\.nodes` is 2, and 1 work"):
        check_size(2, 1)


def test_passes_that_cannot_be_shared_are_refused():
    with pytest.raises(ValidationError, match=r"`train\.accumulate` 3 .* `train\.processes` 2"):
        TrainConfig(processes=2, accumulate=3)
