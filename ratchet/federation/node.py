"""Answer one request of the coordinator, on a node: `python -m ratchet.federation.node REQUEST REPLY`.

The node's checkout is the working directory. Stages run as in a retraining, on the node's own rows, with the
coordinator's settings of `tokenize`, `train` and `adapter`; they write into .ratchet/federation/node. A reply
holds weights, counts and sums. What went wrong in a stage is told in the node's own log, since its message
may quote rows; the coordinator learns which stage it was.

A request that was answered before gets the same reply again, so a coordinator that was killed may ask anew.
One request is answered at a time. A node that was killed in a training goes on from its checkpoint. One that
was killed in a step of a secure sum has stored what it was asked, or has said nothing: asked the same again,
it gives the bytes that it would have given, and no other answer ever (`ratchet.federation.masking`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ratchet.config.params import load_config
from ratchet.config.training import AdapterConfig
from ratchet.errors import DataError, RatchetError, UserError
from ratchet.evaluation.node_scores import ALL, Sums, read_groups, sign_of
from ratchet.federation import masking, messages
from ratchet.federation.aggregation import DOWN
from ratchet.federation.audit import DRAWN, Drawn, guess_planted, keep_drawn, words_of_guesses
from ratchet.federation.messages import Message, write_message
from ratchet.federation.records import (
    DELIVERED,
    DELIVERY,
    NODE,
    OWN_SCORES,
    TOOK_PART,
    Delivery,
    Done,
    OwnScores,
    read_node,
    read_rounds,
)
from ratchet.federation.secure import tag_of, words_of
from ratchet.federation.state import GLOBAL, KEPT
from ratchet.files import (
    read_json,
    sha256_file,
    sha256_json,
    whole_folder,
    write_bytes,
    write_json,
    write_private,
)
from ratchet.models.adapters import RESIDUAL, complete_version
from ratchet.models.loading import MANIFEST, WEIGHTS
from ratchet.models.manifests import read_trained_manifest
from ratchet.pipeline.checkout import child_environment
from ratchet.pipeline.stage import say

IDENTITY = ("model", "revision", "files", "weights")  # of a base
DAY = dt.timedelta(days=1)
# These audits are the coordinator's: they would plant rows, or ask a judge on another machine.
NO_AUDITS = {
    "canaries": 0,
    "audit_canaries": 0,
    "bias_pairs": 0,
    "blind_rows": 0,
    "picture_features": 0,
    "attacks": 0,
    "groups": [],
    "suites": [],
    "custom": [],
    "slices": [],
    "judge": {},
}
WORDS = "words.npy"  # what a node adds to a secure sum, under masks
KEPT_SECONDS = 7 * 86_400  # that a reply can be asked for again


class Refusal(UserError):
    """A reason that the coordinator may read: it holds nothing of the node's rows."""


def identity(base: Path) -> dict[str, Any]:
    """Return what makes a base the same on two machines."""
    manifest = read_json(base / MANIFEST)
    return {key: manifest.get(key) for key in IDENTITY}


def handle(root: Path, data: bytes) -> bytes:
    """Return the reply to a request. What fails becomes a reply as well: Refused.

    Raises ChildProcessError: a stage was killed, so the request is to be answered again.
    """
    with _alone(root / NODE):
        return _answer(root, root / NODE, data)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for the request that is being answered.

    Its stages hold the lock as well: a training outlives the command that was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        yield


def _answer(root: Path, folder: Path, data: bytes) -> bytes:
    kept = folder / "replies" / f"{hashlib.sha256(data).hexdigest()}.safetensors"
    if kept.exists():
        return kept.read_bytes()
    try:
        message = messages.read_request(data)
        reply = ANSWERS[type(message.header)](root, folder, message)
    except Refusal as error:
        say(f"refused: {error}", error=True)
        return write_message(messages.Refused(str(error).splitlines()[0]))
    except RatchetError as error:
        say(f"{type(error).__name__}: {error}", error=True)
        return write_message(messages.Refused("the request could not be answered; the node's log says why"))
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(kept, [reply])
    return reply


# --- training ---


class Work(NamedTuple):
    """The node's files of the stages before the training."""

    base: Path
    prepared: Path
    tokens: Path
    params: Path


def _train(root: Path, folder: Path, message: Message) -> bytes:
    asked: messages.Train = message.header
    rounds = read_rounds(root)
    others = [done for done in rounds if (done.run, done.round) != (asked.run, asked.round)]
    known = len(others) < len(rounds)  # killed before its reply was kept, or asked again after a week
    _check_limits(root, others)
    run = folder / "work" / f"{asked.run}-{asked.round}"
    if known and not run.exists():
        raise Refusal(f"this node took part in round {asked.round} of {asked.run} before")
    _clean(folder, asked.run)
    number = asked.audit_canaries
    drawn = keep_drawn(_canaries(folder, asked.run), number) if number else None
    work = prepare(root, folder, asked.params, asked.base, drawn=drawn)
    write_start(
        run / "start", message.tensors, asked.adapter_config, asked.scale, asked.params["adapter"], asked.base
    )
    # The ledger of what was spent of the rows' privacy stands beside the reports, and stays.
    candidate, reports = run / "candidate", folder / "trainings" / run.name
    _stage(
        root,
        "train",
        {
            "params": work.params,
            "tokens": work.tokens,
            "base": work.base,
            "incumbent": run / "start",
            "out": candidate,
            "reports": reports,
        },
        {"RATCHET_ROOT": str(folder)},
    )
    figures, trained = read_json(reports / "figures.json"), load_file(candidate / WEIGHTS)
    promise = read_trained_manifest(candidate).privacy
    rows = int(figures["rows"]["rows"])
    done = Done(
        dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        asked.run,
        asked.round,
        rows,
        int(figures["steps"]),
        float(figures["seconds"]),
        float(figures["train_loss"]),
        figures["best_validation_loss"],
        promise.epsilon_together if promise else None,
        read_json(work.tokens / "profile.json")["batches"],
    )
    if not known:
        write_bytes(folder / TOOK_PART, [msgspec.json.encode(each) + b"\n" for each in (*rounds, done)])
    header = messages.Trained(
        rows=0 if asked.masked else rows,  # the sum tells the rows of all
        steps=done.steps,
        learned_tokens=0 if asked.masked else int(figures["rows"]["learned_tokens"]),
        seconds=done.seconds,
        train_loss=done.train_loss,
        validation_loss=done.validation_loss,
        epsilon=done.epsilon,
    )
    if not asked.masked:
        return write_message(header, trained)
    start = load_file(run / "start" / WEIGHTS)
    words = words_of(trained, start, rows, asked.params["train"]["factors"])
    write_bytes(run / WORDS, [words.tobytes()])
    return write_message(header)


def _clean(folder: Path, run: str) -> None:
    """Remove what earlier runs left: adapters, and the keys of their masks."""
    for path in (folder / "work").glob("*"):
        if not path.name.startswith(f"{run}-"):
            shutil.rmtree(path)
    for path in (folder / "replies").glob("*"):  # also what a kill left half-written
        if time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink()


def _check_limits(root: Path, rounds: Iterable[Done]) -> None:
    """Raise Refusal: not at this hour, or the other `rounds` that it took part in are as many as it may."""
    node, now = read_node(root), dt.datetime.now(dt.UTC)
    lately = [done for done in rounds if now - dt.datetime.fromisoformat(done.time) < DAY]
    if node.rounds_a_day is not None and len(lately) >= node.rounds_a_day:
        raise Refusal(f"this node takes part in {node.rounds_a_day} rounds a day, and did so today")
    if node.hours and not _is_open(node.hours, dt.datetime.now().hour):
        raise Refusal(f"this node trains between {node.hours} o'clock of its own time")


def _is_open(hours: str, hour: int) -> bool:
    first, last = map(int, hours.split("-"))
    return first <= hour < last if first < last else hour >= first or hour < last


def prepare(
    root: Path,
    folder: Path,
    params: Mapping[str, Any],
    base: Mapping[str, Any],
    more: Mapping[str, Any] = MappingProxyType({}),
    drawn: Drawn | None = None,
) -> Work:
    """Run the stages before the training where something changed since they ran.

    `more` are sections for a stage after them; canaries that were `drawn` are planted among the tokens.
    Raises Refusal.
    """
    config = load_config(root / "params.yaml").model_dump(mode="json")
    config |= {name: dict(params[name]) for name in ("tokenize", "train", "adapter")}
    # The global adapter stands where the champion does in a retraining, and has seen none of these rows.
    config["train"] |= {"start_from": "champion", "rows": "all"}
    config["gate"]["guardrails"] = []
    for section, values in more.items():
        config[section] |= values
    config["evaluate"] |= NO_AUDITS | ({"audit_canaries": drawn.number} if drawn else {})
    most, privacy = read_node(root).epsilon, config["train"]["privacy"]
    if most is not None:
        if privacy["epsilon"] is None or privacy["epsilon"] > most:
            seen = "none" if privacy["epsilon"] is None else f"{privacy['epsilon']:g}"
            raise Refusal(
                f"this node's rows may spend ε = {most:g} at most, and the coordinator asks for {seen}"
            )
        config["train"]["privacy"] = privacy | {"budget": most}
    place = folder / "planted" if drawn else folder
    work = Work(folder / "base", folder / "prepared", place / "tokenized", folder / "params.yaml")
    write_bytes(work.params, [json.dumps(config, indent=1).encode()])
    nobody = place / "nobody"
    nobody.mkdir(parents=True, exist_ok=True)
    key = {"adapter_sha256": drawn.key} if drawn else {}  # from which `tokenize` draws, too
    write_json(nobody / MANIFEST, {"version": None, "batches": [], **key})
    data = root / "data"
    if not any((data / "raw").glob("**/*.jsonl")):
        raise Refusal("this node holds no batch of rows")
    forgotten = data / "forgotten.jsonl"
    _make_base(root, folder, config)
    check_base(work.base, base)
    inputs = [data / "raw", data / "golden.jsonl", forgotten]
    made = sha256_json({"prepare": config["prepare"], "files": list(_stamps(inputs))})
    raw = {"raw": data / "raw", "golden": data / "golden.jsonl", "forgotten": forgotten}
    _once(root, "prepare", work.prepared, made, {"params": work.params, **raw, "out": work.prepared})
    made = sha256_json(
        {
            "before": made,
            "base": dict(base),
            "tokenize": config["tokenize"],
            "objective": config["train"]["objective"],
            **(drawn._asdict() if drawn else {}),
        }
    )
    paths = {"prepared": work.prepared, "base": work.base, "incumbent": nobody}
    _once(root, "tokenize", work.tokens, made, {"params": work.params, **paths, "out": work.tokens})
    return work


def _make_base(root: Path, folder: Path, config: Mapping[str, Any]) -> None:
    method = [config["adapter"][key] for key in ("method", "quantisation")]
    made = sha256_json({"base": config["base"], "method": method})
    paths = {"params": folder / "params.yaml", "out": folder / "base", "proof": folder / "proof.json"}
    _once(root, "base", folder / "base", made, paths)


def check_base(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise Refusal unless the base in `folder` is the coordinator's, whose identity is `wanted`."""
    ours = identity(folder)
    if odd := next((key for key in IDENTITY if ours[key] != wanted.get(key)), None):
        raise Refusal(
            f"this node's base is another one: its {odd} is {_short(ours[odd])}, the coordinator's "
            f"{_short(wanted.get(odd))}; set `base.model` and `base.revision` as the coordinator has them"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"sha256 {sha256_json(value)[:16]}"


def _stamps(paths: Iterable[Path]) -> Iterable[tuple[str, int, int]]:
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []:
            if file.is_file():
                found = file.stat()
                yield file.name, found.st_size, found.st_mtime_ns


def _once(root: Path, stage: str, out: Path, made: str, paths: Mapping[str, Path]) -> None:
    """Run a stage, unless its output was made from the same inputs."""
    note = out.with_name(f"{out.name}.made")
    if out.exists() and note.exists() and note.read_text() == made:
        return
    note.unlink(missing_ok=True)
    _stage(root, stage, paths, {"RATCHET_ROOT": str(root)})
    write_bytes(note, [made.encode()])


def _stage(root: Path, stage: str, paths: Mapping[str, Path], environment: Mapping[str, str]) -> None:
    flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    ours = {
        name: value
        for name, value in child_environment().items()
        if not name.startswith(("MLFLOW_", "PREFECT_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", f"tasks.{stage}", *flags],
        cwd=root,
        env={**ours, **environment},
        close_fds=False,  # for the lock
        check=False,
    )
    if done.returncode < 0:
        raise ChildProcessError(f"the stage {stage} was killed by signal {-done.returncode}")
    if done.returncode:
        raise Refusal(f"the stage {stage} ended with code {done.returncode}; this node's log says why")


def write_start(
    folder: Path,
    tensors: Mapping[str, Tensor],
    adapter_config: Mapping[str, Any],
    scale: float,
    adapter: Mapping[str, Any],
    base: Mapping[str, Any],
) -> None:
    """Write the global adapter as an incumbent, from which the stage `train` starts.

    `tensors` are those of `ratchet.federation.state.state_tensors`, `adapter` is the section of params.yaml.
    """
    parts = {
        prefix: {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        for prefix in (GLOBAL, KEPT)
    }
    if not parts[GLOBAL]:
        raise DataError("the request to train holds no adapter")
    with whole_folder(folder) as whole:
        write_adapter(whole, parts[GLOBAL], adapter_config)
        write_json(
            whole / MANIFEST,
            {
                "version": 0,
                "batches": [],
                "adapter": dict(adapter),
                "base": dict(base),
                "privacy": None,  # the coordinator has seen to it that what it sends was learned with privacy
            },
        )
        if parts[KEPT]:
            rank = next(tensor.shape[0] for name, tensor in parts[KEPT].items() if name.endswith(DOWN))
            config = {**adapter_config, "r": rank, "lora_alpha": scale * rank, "use_rslora": False}
            (whole / RESIDUAL).mkdir()
            write_adapter(whole / RESIDUAL, parts[KEPT], config)


def write_adapter(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    write_bytes(folder / WEIGHTS, [save(dict(weights), {"format": "pt"})])
    write_json(folder / "adapter_config.json", dict(config))


# --- evaluation ---


def _score(root: Path, folder: Path, message: Message) -> bytes:
    asked: messages.Score = message.header
    _check_limits(root, [])
    evaluate = {**asked.params["evaluate"], "metrics": [asked.metric]}
    if asked.metric == "answer_nll":
        evaluate["metrics"] = ["exact_match"]  # the likelihood is always measured
    more = {"evaluate": evaluate, "gate": {"metric": asked.metric}}
    work = prepare(root, folder, asked.params, asked.base, more)
    run = folder / "work" / f"{asked.run}-score"
    folders = {"candidate": run / "candidate", "champion": run / "champion"}
    for name, home in folders.items():
        weights = {
            key.removeprefix(f"{name}:"): tensor
            for key, tensor in message.tensors.items()
            if key.startswith(f"{name}:")
        }
        if not weights:
            continue
        _write_version(home, work.base, weights, asked.adapters[name], asked.records[name], asked.max_length)
    rival = "champion" if folders["champion"].exists() else "base"
    paths = {
        "params": work.params,
        "prepared": work.prepared,
        "base": work.base,
        "incumbent": folders["champion"] if rival == "champion" else folder / "nobody",
        "candidate": folders["candidate"],
        "region": root / "data/region.json",
        "own": root / "metrics",
        "out": run / "evaluation",
    }
    _stage(root, "evaluate", paths, {"RATCHET_ROOT": str(folder)})
    groups = read_groups(run / "evaluation/scores.parquet", asked.metric, rival, asked.least)
    shutil.rmtree(run)
    if ALL in groups:
        _keep_scores(folder, asked, rival, groups[ALL])
    if not asked.masked:
        return write_message(messages.Scored(groups))
    if ALL not in groups:
        raise Refusal(f"it has fewer than {asked.least} held-out rows")
    place = _member(folder, asked).parent
    place.mkdir(parents=True, exist_ok=True)
    write_bytes(place / WORDS, [np.array(msgspec.structs.astuple(groups[ALL]), np.float64).tobytes()])
    return write_message(messages.Scored({}))


def _write_version(
    home: Path,
    base: Path,
    weights: Mapping[str, Tensor],
    adapter_config: Mapping[str, Any],
    record: Mapping[str, Any],
    max_length: int,
) -> None:
    """Write a version that the coordinator sent, to be asked here."""
    with whole_folder(home) as whole:
        write_adapter(whole, weights, adapter_config)
        complete_version(
            whole,
            base,
            run_key=home.name,
            inputs={},
            batches=[],
            profile={"max_length": max_length},
            adapter=AdapterConfig(**record),
            more={"version": 0},
        )


def _canaries(folder: Path, run: str) -> Path:
    return folder / "work" / f"{run}-canaries"


def _audit(root: Path, folder: Path, message: Message) -> bytes:
    asked: messages.Audit = message.header
    _check_limits(root, [])
    kept, version = _canaries(folder, asked.run), folder / "work" / f"{asked.run}-audited"
    if not (kept / DRAWN).exists():
        raise Refusal(f"this node has planted no canaries in {asked.run}")
    check_base(folder / "base", asked.base)
    messages.check_finite(message.tensors)
    _write_version(
        version, folder / "base", message.tensors, asked.adapter_config, asked.record, asked.max_length
    )
    guesses = guess_planted(folder / "base", version, keep_drawn(kept), asked.batch_size)
    shutil.rmtree(version)
    if not asked.masked:
        return write_message(messages.Audited(guesses))
    place = _member(folder, asked).parent
    place.mkdir(parents=True, exist_ok=True)
    write_bytes(place / WORDS, [words_of_guesses(guesses).tobytes()])
    return write_message(messages.Audited(None))


# --- the version that came out ---


def _deliver(root: Path, folder: Path, message: Message) -> bytes:
    """Keep the version in place of the one that was delivered before."""
    asked: messages.Deliver = message.header
    messages.check_finite(message.tensors)
    if not any(name.endswith(DOWN) for name in message.tensors):
        raise DataError("the version that was delivered holds no adapter")
    if not (folder / "base").exists():  # this node took part in no round yet
        config = load_config(root / "params.yaml").model_dump(mode="json") | {"adapter": asked.record}
        write_bytes(folder / "params.yaml", [json.dumps(config, indent=1).encode()])
        _make_base(root, folder, config)
    check_base(folder / "base", asked.base)
    delivery = Delivery(
        dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        asked.run,
        asked.version,
        asked.base,
        asked.record,
        asked.max_length,
        asked.start,
        asked.federation,
    )
    with whole_folder(folder / DELIVERED) as whole:
        write_adapter(whole, message.tensors, asked.adapter_config)
        files = {path.name: f"sha256:{sha256_file(path)}" for path in sorted(whole.iterdir())}
        kept = msgspec.structs.replace(delivery, files=files)
        write_json(whole / DELIVERY, msgspec.to_builtins(kept))
    return write_message(messages.Delivered())


def _keep_scores(folder: Path, asked: messages.Score, rival: str, sums: Sums) -> None:
    """Keep the means for the node's own status."""
    before, after = (sign_of(asked.metric) * total / sums.rows for total in (sums.rival, sums.candidate))
    own = OwnScores(asked.run, asked.metric, rival, sums.rows, before, after)
    write_json(folder / OWN_SCORES, msgspec.to_builtins(own))


# --- secure aggregation ---


def _member(folder: Path, asked: Any) -> Path:
    return folder / "work" / f"{asked.run}-{asked.round}" / "member.json"


def _known_member(folder: Path, asked: Any) -> masking.Member | None:
    path = _member(folder, asked)
    return masking.Member.restore(read_json(path)) if path.exists() else None


def _restore(folder: Path, asked: Any) -> masking.Member:
    member = _known_member(folder, asked)
    if member is None or member.tag != tag_of(asked.run, asked.round, asked.attempt):
        raise Refusal(f"this node has no keys of this try of round {asked.round} of {asked.run}")
    return member


def _store(folder: Path, asked: Any, member: masking.Member) -> None:
    write_private(_member(folder, asked), json.dumps(member.state()).encode())


def _keys(root: Path, folder: Path, message: Message) -> bytes:
    asked: messages.Keys = message.header
    if not (_member(folder, asked).parent / WORDS).exists():
        raise Refusal(f"this node has trained nothing in round {asked.round} of {asked.run}")
    wanted = (asked.place, tag_of(asked.run, asked.round, asked.attempt), asked.threshold)
    member = _known_member(folder, asked)
    if member is None or (member.tag != wanted[1] and not member.has_revealed):
        member = masking.Member(*wanted)  # the keys of an earlier try are gone for good
        _store(folder, asked, member)
    if member.tag != wanted[1]:
        raise Refusal("this node gave its shares of this round in an earlier try, and does so once")
    if (member.place, member.tag, member.threshold) != wanted:
        raise Refusal("this node gave its keys of this try before, as another one's or for another threshold")
    return write_message(messages.Published(*(key.hex() for key in member.publics)))


def _deal(root: Path, folder: Path, message: Message) -> bytes:
    asked: messages.Deal = message.header
    member = _restore(folder, asked)
    publics = {
        place: masking.Publics(bytes.fromhex(one), bytes.fromhex(other))
        for place, (one, other) in asked.publics.items()
    }
    letters = member.deal(publics)
    _store(folder, asked, member)
    return write_message(messages.Dealt({place: letter.hex() for place, letter in letters.items()}))


def _mask(root: Path, folder: Path, message: Message) -> bytes:
    asked: messages.Mask = message.header
    member = _restore(folder, asked)
    letters = {sender: bytes.fromhex(letter) for sender, letter in asked.letters.items()}
    values = np.frombuffer((_member(folder, asked).parent / WORDS).read_bytes(), np.float64)
    words = member.mask(letters, masking.encode(values, len(letters) + 1))
    _store(folder, asked, member)
    return write_message(messages.Masked(), {"words": torch.from_numpy(words.view(np.int64))})


def _reveal(root: Path, folder: Path, message: Message) -> bytes:
    asked: messages.Reveal = message.header
    member = _restore(folder, asked)
    shares = member.reveal(asked.sent, asked.dropped)
    _store(folder, asked, member)
    return write_message(
        messages.Revealed(
            {node: hex(share.value) for node, share in shares.keys.items()},
            {node: hex(share.value) for node, share in shares.seeds.items()},
        )
    )


ANSWERS: dict[Any, Callable[[Path, Path, Message], bytes]] = {
    messages.Train: _train,
    messages.Score: _score,
    messages.Audit: _audit,
    messages.Deliver: _deliver,
    messages.Keys: _keys,
    messages.Deal: _deal,
    messages.Mask: _mask,
    messages.Reveal: _reveal,
}


if __name__ == "__main__":
    write_bytes(Path(sys.argv[2]), [handle(Path.cwd(), Path(sys.argv[1]).read_bytes())])
