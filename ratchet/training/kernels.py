"""Choose how a training is computed: attention, compiled layers, Liger's kernels."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from ratchet.errors import ConfigError
from ratchet.models.loading import has_tower, layers_of, without_adapter

# Tokens of a row up to which plain attention is faster on a CPU; its memory grows with the
# square of their number.
EAGER_LENGTH = 1024
# Liger's losses stay off: ours weights tokens itself, and computes logits only where tokens are learned.
LIGER = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "geglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


@contextlib.contextmanager
def fast_attention(model: Any, longest: int) -> Iterator[None]:
    """Use plain attention on a CPU if rows are short (`longest`, in tokens): fused is slower there.

    A tower of pictures or sound keeps its own: it sees several times as many patches as there are tokens.
    """
    base = without_adapter(model)
    tower = has_tower(base)
    kept = base.config.get_text_config()._attn_implementation

    def attend(kind: str) -> None:
        base.set_attn_implementation({"text_config": kind} if tower else kind)

    if not torch.cuda.is_available() and longest <= EAGER_LENGTH:
        attend("eager")
    try:
        yield
    finally:
        attend(kept)


@contextlib.contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Compile layer by layer, so that one compilation serves all layers and every shape of a batch."""
    layers = layers_of(model)
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def check_compiler() -> None:
    """Raise ConfigError if there is no C++ compiler, which torch.compile needs on a CPU."""
    if not torch.cuda.is_available() and not any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))
    ):
        raise ConfigError(
            "`train.compile` needs a C++ compiler, and neither g++ nor clang++ is here",
            remedy="install g++, or set `train.compile: false`",
        )


def apply_liger(model: Any) -> None:
    """Put Liger's kernels into `model`. Raises ConfigError: there is no GPU, or no liger-kernel.

    The Trainer's own switch is not used, because it passes evaluations a key that only Liger's loss knows.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "`train.liger` needs a GPU with CUDA, and this machine has none",
            remedy="set `train.liger: false`",
        )
    if not importlib.util.find_spec("liger_kernel"):
        raise ConfigError(
            "`train.liger` needs the package liger-kernel, which is not installed",
            remedy="install the extra `kernels`, or set `train.liger: false`",
        )
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, LIGER)  # type: ignore[no-untyped-call]
