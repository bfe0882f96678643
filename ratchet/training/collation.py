"""Pad windows, or rows of like length, to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ratchet.training.packing import IGNORED, Window

if TYPE_CHECKING:
    pass


class _Items(torch.utils.data.Dataset[Any]):
    """Windows, or groups of rows."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]


class _Collator:
    """Pads to the longest window. Padding stands at position 0, each token a row by itself, and bears no loss."""

    def __init__(self, pad_id: int) -> None:
        self._fill = Window([pad_id], [IGNORED], [0])

    def __call__(self, windows: Sequence[Window]) -> dict[str, torch.Tensor]:
        length = max(len(window.input_ids) for window in windows)
        columns = {}
        for name, fill in zip(Window._fields, self._fill, strict=True):
            columns[name] = torch.tensor(
                [getattr(window, name) + fill * (length - len(window.input_ids)) for window in windows]
            )  # (batch, seq)
        return columns


class _RowCollator:
    """One group of rows, padded behind."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, groups: Sequence[list[Window]]) -> dict[str, torch.Tensor]:
        (rows,) = groups
        length = max(len(row.input_ids) for row in rows)
        missing = [length - len(row.input_ids) for row in rows]
        columns = {
            "input_ids": [
                row.input_ids + [self._pad_id] * short for row, short in zip(rows, missing, strict=True)
            ],
            "labels": [row.labels + [IGNORED] * short for row, short in zip(rows, missing, strict=True)],
            "attention_mask": [[1] * (length - short) + [0] * short for short in missing],
        }
        return {name: torch.tensor(column) for name, column in columns.items()}  # (batch, seq)
