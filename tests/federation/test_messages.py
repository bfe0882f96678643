"""What arrives is read as safetensors and JSON, checked whole, and refused otherwise."""

from __future__ import annotations

import pickle
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save

from ratchet.errors import DataError
from ratchet.federation.messages import (
    VERSION,
    Refused,
    Trained,
    check_tensors,
    read_reply,
    read_request,
    write_message,
)

TRAINED = Trained(rows=3, steps=2, learned_tokens=9, seconds=0.5, train_loss=1.0, validation_loss=None)


def test_a_message_comes_as_it_went():
    sent = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.int64)}
    header, tensors = read_reply(write_message(TRAINED, sent))
    assert header == TRAINED
    assert tensors.keys() == sent.keys() and all(torch.equal(tensors[name], sent[name]) for name in sent)
    assert read_reply(write_message(Refused("no"))) == (Refused("no"), {})


def test_a_message_has_the_same_bytes_each_time():
    """Nodes know a request that they answered by its bytes."""
    assert len({write_message(TRAINED, {"a": torch.ones(2)}) for _ in range(20)}) == 1


def changed(**entries: str) -> bytes:
    told = {"version": str(VERSION), "header": msgspec.json.encode(TRAINED).decode()} | entries
    envelope = ",".join(f'"{name}":{value}' for name, value in told.items())
    return save({"x": torch.zeros(1)}, {"message": f"{{{envelope}}}"})


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (pickle.dumps({"weights": [1.0]}), "cannot be read"),
        (b"", "cannot be read"),
        (write_message(TRAINED)[:-3], "cannot be read"),
        (save({"x": torch.zeros(1)}), "cannot be read"),
        (changed(version="0"), "version 0"),
        (changed(header='{"type":"trained","rows":1}'), "cannot be read"),
        (changed(header='{"type":"refused","reason":"","more":1}'), "cannot be read"),
        (changed(header='{"type":"train"}'), "cannot be read"),  # a request in place of a reply
        (changed(header="{"), "cannot be read"),
    ],
)
def test_what_is_no_reply_is_refused(data: bytes, told: str):
    with pytest.raises(DataError, match=told):
        read_reply(data)


def test_a_reply_is_no_request():
    with pytest.raises(DataError, match="cannot be read"):
        read_request(write_message(TRAINED))


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({}, "other weights than asked for: 1, such as a"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, "such as b"),
        ({"a": torch.zeros(3, 2)}, r"\(3, 2\)"),
        ({"a": torch.zeros(2, 3, dtype=torch.float64)}, "float64"),
        ({"a": torch.full((2, 3), float("nan"))}, "not finite"),
        ({"a": torch.full((2, 3), float("inf"))}, "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tensors: Any, told: str):
    with pytest.raises(DataError, match=told):
        check_tensors(tensors, {"a": torch.zeros(2, 3)})
