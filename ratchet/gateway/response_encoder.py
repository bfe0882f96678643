"""Write answers as OpenAI's Responses: in one body, or as events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ratchet.gateway.responses import ResponseChat
from ratchet.serving.engine import JsonForm, Piece
from ratchet.serving.faults import Fault
from ratchet.serving.protocol import Answer, count_tokens, encode_scored


@dataclass
class ResponseEncoder:
    """The encoder of one response: whole, or as the events that OpenAI's clients expect."""

    id: str
    created: int
    fingerprint: str
    chat: ResponseChat
    _number: int = 0  # of the next event
    _opened: bool = False  # whether the events of the answer's text have begun

    def whole(self, answers: Sequence[Answer]) -> bytes:
        return msgspec.json.encode(self._response(answers))

    def begin(self) -> bytes:
        return b"".join(
            [
                self._event("response.created", response=self._response()),
                self._event("response.in_progress", response=self._response()),
            ]
        )

    def piece(self, index: int, piece: Piece) -> bytes:
        """Return the events of a piece's text; calls come last, so `end` writes them.

        This form of the protocol has no events for reasoning.
        """
        if not piece.text and (piece.reasoning or not self._opened):
            return b""
        delta = {"delta": piece.text, "logprobs": [encode_scored(token) for token in piece.tokens]}
        return self._open() + self._event("response.output_text.delta", **self._place(), **delta)

    def end(self, answers: Sequence[Answer]) -> bytes:
        response = self._response(answers)
        ends = [
            self._end_text(place, item) if item["type"] == "message" else self._call(place, item)
            for place, item in enumerate(response["output"])
        ]
        return b"".join([*ends, self._event(f"response.{response['status']}", response=response)])

    def _open(self) -> bytes:
        if self._opened:
            return b""
        self._opened = True
        item = self._item([], "in_progress")
        return self._event("response.output_item.added", output_index=0, item=item) + self._event(
            "response.content_part.added", **self._place(), part=self._part("", [])
        )

    def _end_text(self, place: int, item: dict[str, Any]) -> bytes:
        (part,) = item["content"]
        more = {"text": part["text"], "logprobs": part["logprobs"]}
        return b"".join(
            [
                self._open(),
                self._event("response.output_text.done", **self._place(), **more),
                self._event("response.content_part.done", **self._place(), part=part),
                self._event("response.output_item.done", output_index=place, item=item),
            ]
        )

    def _call(self, place: int, item: dict[str, Any]) -> bytes:
        at = {"item_id": item["id"], "output_index": place}
        begun = item | {"arguments": "", "status": "in_progress"}
        kind = "response.function_call_arguments"
        return b"".join(
            [
                self._event("response.output_item.added", output_index=place, item=begun),
                self._event(f"{kind}.delta", **at, delta=item["arguments"]),
                self._event(f"{kind}.done", **at, name=item["name"], arguments=item["arguments"]),
                self._event("response.output_item.done", output_index=place, item=item),
            ]
        )

    def fail(self, fault: Fault) -> bytes:
        error = {"code": fault.code or "server_error", "message": fault.message}
        failed = self._response() | {"status": "failed", "error": error}
        return self._event("response.failed", response=failed)

    def _event(self, kind: str, **more: Any) -> bytes:
        data = msgspec.json.encode({"type": kind, "sequence_number": self._number, **more})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    @property
    def _item_id(self) -> str:
        return f"msg_{self._own_id}"

    @property
    def _own_id(self) -> str:
        return self.id.removeprefix("resp_")

    def _response(self, answers: Sequence[Answer] = ()) -> dict[str, Any]:
        """Return the response as it is now; without answers it is in progress."""
        cut = any(answer.ended and answer.ended.finish == "length" for answer in answers)
        status = "in_progress" if not answers else "incomplete" if cut else "completed"
        chat = self.chat
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if answers else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": chat.instructions,
            "max_output_tokens": chat.max_tokens,
            "model": chat.model,
            "output": [item for answer in answers for item in self._items(answer, status)],
            "parallel_tool_calls": chat.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": chat.temperature,
            "text": {"format": _format(chat.form)},
            "tool_choice": chat.tool_choice,
            "tools": chat.told_tools,
            "top_logprobs": chat.top_logprobs or 0,
            "top_p": chat.top_p,
            "truncation": "disabled",
            "usage": _usage(answers) if answers else None,
            "user": chat.user or None,
            "metadata": chat.metadata or {},
        }

    def _items(self, answer: Answer, status: str) -> list[dict[str, Any]]:
        """Return an item for the text, unless there are only calls, and one for each call."""
        scores = [encode_scored(token) for token in answer.tokens]
        text = [self._item([self._part(answer.text, scores)], status)]
        calls = [
            {
                "id": f"fc_{self._own_id}_{number}",
                "type": "function_call",
                "status": "completed",
                "call_id": f"call_{self._own_id}_{number}",
                "name": call.name,
                "arguments": msgspec.json.encode(call.arguments).decode(),
            }
            for number, call in enumerate(answer.calls)
        ]
        return [*(text if answer.text or not calls else ()), *calls]

    def _item(self, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _format(form: JsonForm | None) -> dict[str, Any]:
    if form is None:
        return {"type": "text"}
    if not form.schema:
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "name": form.name,
        "schema": msgspec.Raw(form.schema.encode()),
        "strict": True,
    }


def _usage(answers: Sequence[Answer]) -> dict[str, Any]:
    read, written = count_tokens(answers)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }
