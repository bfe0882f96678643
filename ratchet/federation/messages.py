"""Write and read what the coordinator and the nodes of a federation send each other.

A message is one safetensors file in memory: its tensors, and a header as JSON in the file's metadata. So
nothing that arrives is ever unpickled, and everything in it is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ratchet.errors import DataError, UserError
from ratchet.evaluation.node_scores import Sums
from ratchet.models.manifests import Together
from ratchet.privacy.audit import Guesses

ENVELOPE = "message"  # the entry of the metadata that holds version and header
VERSION = 3  # of the messages; both sides have to speak the same
MOST = 2**32  # bytes of one message
# A run's id names folders on a node, so it holds no slash and begins with no dot.
Run = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Key = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Letter = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{2}){1,1000}\Z")]
Value = Annotated[str, msgspec.Meta(pattern=r"\A0x[0-9a-f]{1,131}\Z")]  # of a share


class Train(msgspec.Struct, frozen=True, tag="train", forbid_unknown_fields=True, kw_only=True):
    """Ask a node to train from the global adapter, which is among the tensors, on its own rows.

    `params` are the coordinator's sections tokenize, train and adapter; `base` is its base's identity. The
    tensors' names begin with `global:`, and with `residual:` where factors miss something. `adapter_config`
    is PEFT's description of the adapter, `scale` what updates are multiplied by. With `masked` the node keeps
    its update, and gives it under masks. About half of `audit_canaries` rows are trained on as well.
    """

    run: Run
    round: int
    params: dict[str, dict[str, Any]]
    base: dict[str, Any]
    adapter_config: dict[str, Any]
    scale: float
    masked: bool = False
    audit_canaries: int = 0


class Keys(msgspec.Struct, frozen=True, tag="keys", forbid_unknown_fields=True):
    """Ask a node for its public keys of a sum's masks; `place` is its number in the sum, from 1.

    `attempt` is another one each time that the sum of a round is begun anew.
    """

    run: Run
    round: int
    attempt: str
    place: int
    threshold: int


class Deal(msgspec.Struct, frozen=True, tag="deal", forbid_unknown_fields=True):
    """Give a node all public keys (place → two keys in hex), and ask for its letters to the others."""

    run: Run
    round: int
    attempt: str
    publics: dict[int, tuple[Key, Key]]


class Mask(msgspec.Struct, frozen=True, tag="mask", forbid_unknown_fields=True):
    """Give a node the letters of the others (sender → hex), and ask for its update, masked."""

    run: Run
    round: int
    attempt: str
    letters: dict[int, Letter]


class Reveal(msgspec.Struct, frozen=True, tag="reveal", forbid_unknown_fields=True):
    """Ask a node for its shares: of the masks of those that sent, of the keys of those that dropped out."""

    run: Run
    round: int
    attempt: str
    sent: list[int]
    dropped: list[int]


class Score(msgspec.Struct, frozen=True, tag="score", forbid_unknown_fields=True, kw_only=True):
    """Ask a node to answer its own held-out rows, and for counts and sums of the scores.

    The tensors' names begin with `candidate:` and `champion:`; without the latter the candidate is compared
    with the base. A group of fewer rows than `least` is left out. `params` has the sections tokenize, train,
    adapter and evaluate. With `masked` the node keeps its sums of all rows, and gives them under masks.
    """

    run: Run
    params: dict[str, dict[str, Any]]
    base: dict[str, Any]
    adapters: dict[str, dict[str, Any]]  # model → PEFT's description of its adapter
    records: dict[str, dict[str, Any]]  # model → its section `adapter` of params.yaml
    max_length: int  # of a row, in tokens
    metric: str
    least: int
    masked: bool = False
    round: int = 0  # of the secure sum


class Audit(msgspec.Struct, frozen=True, tag="audit", forbid_unknown_fields=True, kw_only=True):
    """Ask a node to guess from the version, whose adapter is the tensors, which canaries it was trained on.

    With `masked` the node keeps its counts, and gives them under masks.
    """

    run: Run
    base: dict[str, Any]
    adapter_config: dict[str, Any]  # PEFT's description
    record: dict[str, Any]  # its section `adapter` of params.yaml
    max_length: int  # of a row, in tokens
    batch_size: int
    masked: bool = False
    round: int = 0  # of the secure sum


class Deliver(msgspec.Struct, frozen=True, tag="deliver", forbid_unknown_fields=True, kw_only=True):
    """Give a node the version that came out; its adapter is the tensors.

    `version` is its number at the coordinator, `start` the sha256 of the adapter that its first round started
    from, or "base".
    """

    run: Run
    version: int | None
    base: dict[str, Any]
    adapter_config: dict[str, Any]  # PEFT's description
    record: dict[str, Any]  # its section `adapter` of params.yaml
    max_length: int  # of a row, in tokens
    start: str
    federation: Together


Request = Train | Keys | Deal | Mask | Reveal | Score | Audit | Deliver


class Trained(msgspec.Struct, frozen=True, tag="trained", forbid_unknown_fields=True, kw_only=True):
    """A node's answer to Train: its numbers; the adapter is among the tensors, unless it is to be masked."""

    rows: int
    steps: int
    learned_tokens: int
    seconds: float
    train_loss: float
    validation_loss: float | None
    epsilon: float | None = None  # spent of the privacy of the node's rows, with earlier trainings


class Published(msgspec.Struct, frozen=True, tag="published", forbid_unknown_fields=True):
    masks: Key
    letters: Key


class Dealt(msgspec.Struct, frozen=True, tag="dealt", forbid_unknown_fields=True):
    letters: dict[int, Letter]  # receiver → hex


class Masked(msgspec.Struct, frozen=True, tag="masked", forbid_unknown_fields=True):
    """The masked vector is the tensor `words`, int64."""


class Revealed(msgspec.Struct, frozen=True, tag="revealed", forbid_unknown_fields=True):
    keys: dict[int, Value]  # of nodes that dropped out → the share's value in hex
    seeds: dict[int, Value]


class Scored(msgspec.Struct, frozen=True, tag="scored", forbid_unknown_fields=True):
    groups: dict[str, Sums]


class Audited(msgspec.Struct, frozen=True, tag="audited", forbid_unknown_fields=True):
    """A node's answer to Audit; None: it gives the counts under masks."""

    guesses: Guesses | None


class Delivered(msgspec.Struct, frozen=True, tag="delivered", forbid_unknown_fields=True):
    """A node keeps the version that it was given."""


class Refused(msgspec.Struct, frozen=True, tag="refused", forbid_unknown_fields=True):
    """A node will not, or cannot; the reason holds nothing of its rows."""

    reason: str


Reply = Trained | Published | Dealt | Masked | Revealed | Scored | Audited | Delivered | Refused


class Message(NamedTuple):
    header: Any
    tensors: dict[str, Tensor]


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    header: msgspec.Raw


def write_message(header: Request | Reply, tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """Return the bytes of a message; the same message has the same bytes in every process.

    All that is said stands in one entry, since safetensors writes several in an order that changes.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}
    text = msgspec.json.encode({"version": VERSION, "header": header}).decode()
    return save(held or {"nothing": torch.zeros(0)}, {ENVELOPE: text})


def read_request(data: bytes) -> Message:
    """Read a request. Raises DataError: it is none, or of another version."""
    return _read(data, Request)


def read_reply(data: bytes) -> Message:
    """Read a reply. Raises DataError: it is none, or of another version."""
    return _read(data, Reply)


def read_answer(answer: bytes | str, kind: type) -> Message:
    """Read what came back from a node: its reply, or the reason why there is none.

    Raises UserError: there is none, or the node refused; DataError: it is no reply of this kind.
    """
    if isinstance(answer, str):
        raise UserError(answer)
    message = read_reply(answer)
    if isinstance(message.header, Refused):
        raise UserError(f"it refused: {message.header.reason}")
    if not isinstance(message.header, kind):
        raise DataError(f"it sent {type(message.header).__name__}; wanted {kind.__name__}")
    return message


def _read(data: bytes, kinds: Any) -> Message:
    if len(data) > MOST:
        raise DataError(f"a message of {len(data)} bytes came; wanted at most {MOST}")
    try:
        envelope = msgspec.json.decode(_metadata(data)[ENVELOPE], type=_Envelope)
        if envelope.version != VERSION:
            raise DataError(
                f"a message of version {envelope.version} came, this side speaks {VERSION}",
                remedy="bring the coordinator and its nodes to the same version of the code",
            )
        header = msgspec.json.decode(envelope.header, type=kinds)
        tensors = load(data)
    except (SafetensorError, msgspec.DecodeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"a message came that cannot be read: {type(error).__name__}: {error}") from None
    tensors.pop("nothing", None)
    return Message(header, tensors)


def _metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file: JSON after eight bytes with its length."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        raise ValueError("no safetensors header")
    found = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if not isinstance(found, dict):
        raise TypeError("no metadata")
    return found


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise DataError unless names, shapes and dtypes are those of `wanted`, and all numbers are finite."""
    if odd := sorted(tensors.keys() ^ wanted.keys()):
        raise DataError(f"the update holds other weights than asked for: {len(odd)}, such as {odd[0]}")
    for name, tensor in tensors.items():
        seen, asked = (tuple(tensor.shape), tensor.dtype), (tuple(wanted[name].shape), wanted[name].dtype)
        if seen != asked:
            raise DataError(f"the weight {name} is {seen[0]} of {seen[1]}; wanted {asked[0]} of {asked[1]}")
    check_finite(tensors)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise DataError unless all numbers are finite."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"the weight {name} holds numbers that are not finite")
