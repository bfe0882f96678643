"""Read a line of a file, in one of the external forms, into messages, tools and a rejected answer.

JSON is read strictly: what other readers accept silently (a key twice, NaN, two objects) is refused.

The forms are those of OpenAI's fine-tuning, of TRL, ShareGPT, Alpaca, Dolly, and plain text. A row is refused
if it has a meaningful key that its form does not read, so that no part of a conversation is lost silently.

Pictures and recordings are references by then (`media:NAME`, made by ratchet/sources/media.py): in parts of a
message, or in a key beside the texts (MEDIA_KEYS). They stand where `<image>` or `<audio>` stands in a text,
else before the first question.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from ratchet.data.examples import (
    CONTINUE,
    MEDIA,
    MEDIA_ERROR,
    MEDIA_MARK,
    MEDIA_NAME,
    Example,
    Message,
    Meta,
    RawRow,
    RowError,
    Tool,
    ToolCall,
    make_example,
    split_reasoning,
    strings_in,
    without_marks,
)
from ratchet.media.names import SOUND, is_sound, kind_of

MOST_DEPTH = 16  # levels of nesting in a row
MAX_LINE = 2**20  # bytes; a longer line is cut, not dropped, so that preparation rejects and counts it
ROLES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# Keys of a message that hold nothing to learn; each `name` that is left out is counted.
QUIET_KEYS = frozenset({"name", "refusal", "audio", "annotations", "id"})
PICTURE_KEYS = (  # keys beside the texts that hold a picture or a list of pictures
    *("image", "images", "image_path", "image_paths", "image_url", "image_urls"),
    *("img", "picture", "pictures", "photo", "photos"),
)
SOUND_KEYS = (  # and those that hold recordings
    *("audio", "audios", "audio_path", "audio_paths", "audio_url", "audio_urls", "audio_filepath"),
    *("sound", "sounds", "recording", "recordings"),
)
MEDIA_KEYS = (*PICTURE_KEYS, *SOUND_KEYS)
PICTURE_PARTS = frozenset({"image_url", "image", "input_image"})  # types of parts of a message
SOUND_PARTS = frozenset({"input_audio", "audio", "audio_url"})
MEDIA_PARTS = PICTURE_PARTS | SOUND_PARTS
# Where a text has a picture or a recording that stands beside it, as of LLaVA; the key is `is_sound`.
PLACES = {False: "<image>", True: "<audio>"}
# In place of a name: a part {"type": "image"}, whose picture stands beside the messages.
PART_KEYS = ("image_url", "image", "audio_url", "audio", "input_audio", "url", "path")
HOLES = {False: "", True: SOUND}
OF_TURN = ("image", "images", "audio", "audios")  # keys of a user's turn
TURN_KEYS = QUIET_KEYS | {
    *OF_TURN,
    *("role", "from", "content", "value", "weight", "tool_calls", "tool_call_id", "function_call"),
    *("reasoning_content", "reasoning", "thinking"),
}
# Keys that change what is asked or learned: under any settings, a form refuses those that it does not read.
MEANT = frozenset(
    {
        *("system", "history", "tools", "functions", "label", "weight", "input"),
        *("chosen", "rejected", "preferred_output", "non_preferred_output"),
    }
)


class Conversation(NamedTuple):
    """The content of a row; `notes` has one entry for each change that was made to read it."""

    messages: list[Message]
    tools: tuple[Tool, ...] = ()
    rejected: Message | None = None  # an answer to the same prompt that is worse than the last message
    desirable: bool = True  # False: the last message is an answer not to give
    notes: tuple[str, ...] = ()

    def example(self, meta: Meta) -> Example:
        """Normalise and check the conversation. Raises RowError."""
        return make_example(
            self.messages, meta, tools=self.tools, rejected=self.rejected, desirable=self.desirable
        )


class Form(NamedTuple):
    """One form: a row with any of the keys `starts` has this form, which reads only `keys`."""

    starts: frozenset[str]
    keys: frozenset[str]
    read: Callable[[RawRow, Counter[str]], Conversation]


def _messages(row: RawRow, notes: Counter[str]) -> Conversation:
    key = next(key for key in ("messages", "conversations", "conversation") if key in row)
    messages = read_turns(row[key], notes, where=key)
    if text := row.get("system"):
        messages.insert(0, Message("system", _text(text, "system", notes)))
    first = next((message.content for message in messages if message.role == "user"), "")
    if "prompt" in row and row["prompt"] != first.replace(MEDIA_MARK, ""):
        raise RowError(
            "ambiguous",
            f"`prompt` and `{key}` stand side by side and begin differently; which of them is asked?",
        )
    return Conversation(messages, read_tools(row.get("tools") or row.get("functions")))


def _completion(row: RawRow, notes: Counter[str]) -> Conversation:
    asked = _asked(row["prompt"], "prompt", notes)
    answer = _answer(row, ("completion", "response"), notes)
    label = row.get("label", True)
    if not isinstance(label, bool):
        raise RowError(
            "wrong_type",
            f"`label` is {type(label).__name__}, wanted true (a good answer) or false (a bad one)",
        )
    return Conversation([*asked, answer], read_tools(row.get("tools")), desirable=label)


def _preference(row: RawRow, notes: Counter[str]) -> Conversation:
    if "preferred_output" in row:
        given = row.get("input")
        if not isinstance(given, dict) or "messages" not in given:
            raise RowError("missing_key", "`input` of a preference holds no `messages`")
        asked = read_turns(given["messages"], notes, where="input.messages")
        tools = read_tools(given.get("tools"))
        good, bad = (
            read_turns(row.get(key), notes, where=key) for key in ("preferred_output", "non_preferred_output")
        )
    else:
        asked = _asked(row["prompt"], "prompt", notes) if "prompt" in row else []
        tools = read_tools(row.get("tools"))
        good, bad = (_asked(row.get(key), key, notes, role="assistant") for key in ("chosen", "rejected"))
    if asked and good[: len(asked)] == asked == bad[: len(asked)]:
        good, bad = good[len(asked) :], bad[len(asked) :]  # both repeat the prompt
    while len(good) > 1 and len(bad) > 1 and good[0] == bad[0]:
        asked, good, bad = [*asked, good[0]], good[1:], bad[1:]
    if len(good) != 1 or len(bad) != 1:
        raise RowError(
            "preference",
            f"the preferred conversation goes on for {len(good)} messages, the other one for {len(bad)}; "
            "wanted one answer each, to the same prompt",
        )
    if good == bad:
        raise RowError("preference", "the preferred answer and the other one are the same")
    return Conversation([*asked, good[0]], tools, rejected=bad[0])


def _instruction(row: RawRow, notes: Counter[str]) -> Conversation:
    extra = next((_text(row[key], key, notes) for key in ("input", "context") if row.get(key)), "")
    question = _text(row["instruction"], "instruction", notes) + (f"\n\n{extra}" if extra else "")
    messages = [Message("system", _text(row["system"], "system", notes))] if row.get("system") else []
    for pair in row.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("wrong_type", "`history` holds something else than pairs of question and answer")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            messages.append(_said(role, _text(said, "history", notes)))
    return Conversation([*messages, Message("user", question), _answer(row, ("output", "response"), notes)])


def _question(row: RawRow, notes: Counter[str]) -> Conversation:
    asked = _text(row["question"] if "question" in row else row["query"], "question", notes)
    return Conversation([Message("user", asked), _answer(row, ("answer", "response"), notes)])


def _plain_text(row: RawRow, notes: Counter[str]) -> Conversation:
    """Make plain text the answer to a fixed prompt, so that the loss mask covers the whole text."""
    return Conversation([Message("user", CONTINUE), Message("assistant", _text(row["text"], "text", notes))])


def _form(starts: str, keys: str, read: Callable[[RawRow, Counter[str]], Conversation]) -> Form:
    return Form(frozenset(starts.split()), frozenset((*f"{starts} {keys}".split(), *MEDIA_KEYS)), read)


TOOL_KEYS = "tools functions parallel_tool_calls"
FORMS: dict[str, Form] = {  # in the order in which they are tried
    "messages": _form("messages", f"prompt system {TOOL_KEYS}", _messages),
    "sharegpt": _form("conversations conversation", f"prompt system {TOOL_KEYS}", _messages),
    "preference": _form(
        "chosen preferred_output", "prompt input rejected non_preferred_output tools", _preference
    ),
    "completion": _form("prompt", "completion response label tools", _completion),
    "instruction": _form("instruction", "input context output response system history", _instruction),
    "question": _form("question query", "answer response", _question),
    "text": _form("text", "", _plain_text),
}


def recognise_form(row: RawRow) -> str:
    """Return the name of the row's form, by its keys. Raises RowError("unknown_form")."""
    for name, form in FORMS.items():
        if not form.starts.isdisjoint(row):
            return name
    raise RowError(
        "unknown_form",
        f"keys {[key[:40] for key in sorted(row)[:8]]} fit no form; wanted `messages`, `conversations`, "
        "`prompt`/`completion`, `prompt`/`chosen`/`rejected`, `instruction`/`output`, `question`/`answer` "
        "or `text`; `ingest.columns` gives columns these names",
    )


def read_conversation(row: RawRow, form: str = "auto") -> Conversation:
    """Read a row by its form. Raises RowError for a missing key and for a value of a wrong type."""
    name = recognise_form(row) if form == "auto" else form
    wanted = FORMS[name]
    if wanted.starts.isdisjoint(row):
        raise RowError("missing_key", f"`{'` or `'.join(sorted(wanted.starts))}` is missing")
    notes = Counter[str]()
    if any(MEDIA_MARK in text for text in strings_in(row)):
        row = without_marks(row)
        notes["media_marks"] += 1
    found = wanted.read(row, notes)
    if name == "text" and any(row.get(key) for key in MEDIA_KEYS):  # a picture, or speech, and its text
        found = found._replace(messages=[Message("user", ""), *found.messages[1:]])
    messages = _place_media(found.messages, row)
    return found._replace(messages=_cut_unlearned(messages, notes), notes=tuple(notes.elements()))


def whole_rows(lines: Iterable[bytes], form: str = "auto") -> Iterator[Example]:
    """Yield the rows that can become an example, with their `meta`; preparation counts the others."""
    for line in lines:
        try:
            row = msgspec.json.decode(line, type=dict)
            yield read_conversation(row, form).example(row.get("meta") or {})
        except (
            RowError,
            msgspec.DecodeError,
            UnicodeDecodeError,
            RecursionError,
            AttributeError,
            TypeError,
        ):
            continue


# --- turns and tools ----------------------------------------------------------------------------------------


def read_turns(turns: Any, notes: Counter[str], *, where: str = "messages") -> list[Message]:
    """Read OpenAI's messages or ShareGPT's turns; return tools' results in the order of their calls.

    Raises RowError for what is missing, of a wrong type, or impossible to learn.
    """
    if not isinstance(turns, list):
        raise RowError("wrong_type", f"`{where}` is {type(turns).__name__}, wanted a list")
    read = [_read_turn(turn, notes) for turn in turns]
    return order_results([message for message in read if message.role != "system" or message.content])


def _read_turn(turn: Any, notes: Counter[str]) -> Message:
    if not isinstance(turn, dict):
        raise RowError("wrong_type", f"a message is {type(turn).__name__}, wanted an object")
    said = next((key for key in ("role", "from") if key in turn), None)
    if said is None:
        raise RowError("missing_key", "`role` is missing")
    if unknown := turn.keys() - TURN_KEYS:
        raise RowError(
            "unknown_key",
            f"a message holds {[key[:40] for key in sorted(unknown)[:4]]}; known: {sorted(TURN_KEYS)}",
        )
    role = turn[said]
    if not isinstance(role, str):
        raise RowError("wrong_type", f"`{said}` is {type(role).__name__}, wanted text")
    role = ROLES.get(role, role)
    if turn.get("name") and role in ("user", "assistant", "system"):
        notes["speaker_name"] += 1
    calls = read_calls(turn)
    content = turn["content"] if "content" in turn else turn.get("value")
    if content is None and turn.get("refusal"):
        content = turn["refusal"]
    if role == "function_call":  # a turn of ShareGPT that holds only calls
        return Message("assistant", "", _parse_calls(content), learned=_is_learned(turn))
    if content is None and not calls:
        if role == "assistant":
            raise RowError("no_answer", "an assistant's message says nothing and calls nothing")
        raise RowError("missing_key", f"`content` of a message by {role[:40]} is missing")
    text, media = ("", ()) if content is None else _content(content, notes)
    shown = OF_TURN if role == "user" else OF_TURN[:2]  # an assistant's `audio` is what it said
    if beside := [name for key in shown for name in read_references(turn.get(key))]:
        text, media = _place(text, beside) if not media else (text, (*media, *beside))
    reasoning = next(
        (turn[key] for key in ("reasoning_content", "reasoning", "thinking") if turn.get(key)), ""
    )
    if role == "assistant" and not reasoning:
        reasoning, text = split_reasoning(text)
    if role == "system" and not text.strip():
        notes["empty_system"] += 1
        text = ""
    return Message(
        role,
        text,
        calls,
        _text(reasoning, "reasoning", notes) if reasoning else "",
        role != "assistant" or _is_learned(turn),
        str(turn.get("tool_call_id") or "") if role == "tool" else "",
        media,
    )


def _is_learned(turn: RawRow) -> bool:
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise RowError("bad_weight", f"`weight` is {str(weight)[:40]}, wanted 0 or 1")
    return weight != 0


def _content(content: Any, notes: Counter[str]) -> tuple[str, tuple[str, ...]]:
    """Read a text, or parts of texts, pictures and recordings, with a MEDIA_MARK for each of the latter."""
    if not isinstance(content, list):
        return _text(content, "content", notes), ()
    text, media, follows = "", list[str](), False  # whether a text follows a text
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in MEDIA_PARTS:
            given = next((part[key] for key in PART_KEYS if key in part), None)
            media += read_references(given) or [HOLES[kind in SOUND_PARTS]]
            text += MEDIA_MARK * (len(media) - text.count(MEDIA_MARK))
            follows = False
            continue
        if kind not in ("text", "input_text", "refusal") or not isinstance(
            said := part.get("refusal" if kind == "refusal" else "text"), str
        ):
            raise RowError(
                "media" if kind not in ("text", "refusal") else "wrong_type",
                f"a message holds a part of type {str(kind)[:40]!r}; wanted texts, pictures, recordings",
            )
        text += f"\n{said}" if follows else said
        follows = True
    return text, tuple(media)


def read_calls(turn: RawRow) -> tuple[ToolCall, ...]:
    """Read the calls of a message: `tool_calls`, or the older `function_call`. Raises RowError."""
    if turn.get("function_call"):
        return (_read_call(turn["function_call"]),)
    given = turn.get("tool_calls") or ()
    if not isinstance(given, list | tuple):
        raise RowError("wrong_type", f"`tool_calls` is {type(given).__name__}, wanted a list")
    return tuple(_read_call(call) for call in given)


def _parse_calls(text: Any) -> tuple[ToolCall, ...]:
    given = _unfold(text, "bad_tool_call", "a call is")
    return tuple(_read_call(call) for call in (given if isinstance(given, list) else [given]))


def _read_call(call: Any) -> ToolCall:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise RowError("bad_tool_call", "a call of a tool names no function")
    given = inner.get("arguments", inner.get("parameters")) or {}
    arguments = _unfold(given, "bad_tool_call", "the arguments of a call are")
    if not isinstance(arguments, dict):
        raise RowError(
            "bad_tool_call", f"the arguments of a call are {type(arguments).__name__}, wanted an object"
        )
    return ToolCall(inner["name"], arguments, str(call.get("id") or ""))


def _unfold(given: Any, reason: str, what: str) -> Any:
    """Return the value, decoded if the file holds it as JSON text. Raises RowError(reason)."""
    if not isinstance(given, str):
        return given
    try:
        return without_marks(json.loads(given))
    except (ValueError, RecursionError) as error:
        raise RowError(reason, f"{what} no JSON: {error}") from None


def read_tools(given: Any) -> tuple[Tool, ...]:
    """Read the tools that a prompt offers: OpenAI's list, bare functions, or either as JSON text.

    Raises RowError.
    """
    if isinstance(given, str) and given.strip():
        given = _unfold(given, "bad_tool", "`tools` is")
    if not given:
        return ()
    if not isinstance(given, list):
        raise RowError("bad_tool", f"`tools` is {type(given).__name__}, wanted a list")
    tools: list[Tool] = []
    for tool in given:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise RowError("bad_tool", "a tool has no name")
        tools.append({"type": "function", "function": inner})
    if len({tool["function"]["name"] for tool in tools}) < len(tools):
        raise RowError("bad_tool", "two tools have one name")
    return tuple(tools)


def order_results(kept: list[Message]) -> list[Message]:
    """Put tools' results in the order of the calls that they answer, and drop the ids, then not needed.

    Raises RowError for a result that answers no call.
    """
    ordered: list[Message] = []
    position = 0
    while position < len(kept):
        message = kept[position]
        ordered.append(message)
        position += 1
        if not message.tool_calls:
            continue
        after = position
        while after < len(kept) and kept[after].role == "tool":
            after += 1
        places = {call.id: place for place, call in enumerate(message.tool_calls) if call.id}
        results = kept[position:after]
        if results and all(result.call_id for result in results):
            if unknown := [result.call_id for result in results if result.call_id not in places]:
                raise RowError(
                    "tool_results", f"a result answers the call {unknown[0][:40]!r}, which is none"
                )
            results.sort(key=lambda result: places[result.call_id])
        ordered += results
        position = after
    return [
        msgspec.structs.replace(
            message,
            call_id="",
            tool_calls=tuple(ToolCall(call.name, call.arguments) for call in message.tool_calls),
        )
        if message.tool_calls or message.call_id
        else message
        for message in ordered
    ]


def _cut_unlearned(messages: list[Message], notes: Counter[str]) -> list[Message]:
    """Cut off all messages after the last answer that is learned, since none of them is learned."""
    if not messages or messages[-1].role != "assistant" or messages[-1].learned:
        return messages
    last = max(
        (place for place, one in enumerate(messages) if one.role == "assistant" and one.learned), default=None
    )
    if last is None:
        raise RowError("no_answer", "every answer of the row has `weight` 0: nothing is learned")
    notes["unlearned_end"] += 1
    return messages[: last + 1]


# --- pictures and recordings --------------------------------------------------------------------------------


def read_references(given: Any) -> list[str]:
    """Return the names of the pictures or recordings that a value refers to; an empty value refers to none.

    Raises RowError, with its own reason for one that could not be taken.
    """
    if given is None or given == "":
        return []
    if isinstance(given, list):
        return [name for one in given for name in read_references(one)]
    if isinstance(given, dict):
        given = next((given[key] for key in ("url", "image", "audio", "path", "data") if key in given), None)
    text = given if isinstance(given, str) else ""
    if text.startswith(MEDIA) and MEDIA_NAME.fullmatch(text.removeprefix(MEDIA)):
        return [text.removeprefix(MEDIA)]
    if text.startswith(MEDIA_ERROR):
        reason, _, message = text.removeprefix(MEDIA_ERROR).partition(":")
        raise RowError(reason if reason.startswith("media_") else "media", message)
    raise RowError(
        "media", "a picture or recording of the row was not taken in: `ratchet ingest --path FILE` reads it"
    )


def _place_media(messages: list[Message], row: RawRow) -> list[Message]:
    """Give the pictures and recordings that stand beside the messages their places. Raises RowError."""
    names = [name for key in MEDIA_KEYS for name in read_references(row.get(key))]
    if holes := [name for message in messages for name in message.media if name in HOLES.values()]:
        return _fill_holes(messages, names, len(holes))
    if not names:
        return messages
    if any(message.media for message in messages):
        raise RowError("media_place", "the row has pictures or recordings in its messages and beside them")
    asked = [place for place, message in enumerate(messages) if message.role == "user"]
    shown: dict[int, list[str]] = {place: [] for place in asked}
    for sound, mark in PLACES.items():
        mine = [name for name in names if is_sound(name) == sound]
        counts = [messages[place].content.count(mark) for place in asked]
        if mine and (sum(counts) not in (0, len(mine)) or not asked):
            raise RowError(
                "media_place",
                f"{sum(counts)} times {mark} in the user's texts, for {len(mine)} {_kinds(mine)}",
            )
        left = iter(mine)
        for number, (place, count) in enumerate(zip(asked, counts, strict=True)):
            shown[place] += islice(left, count if any(counts) else len(mine) * (number == 0))
    placed = list(messages)
    for place, mine in shown.items():
        if mine:
            text, media = _place(messages[place].content, mine)
            placed[place] = msgspec.structs.replace(messages[place], content=text, media=media)
    return placed


def _fill_holes(messages: list[Message], names: list[str], holes: int) -> list[Message]:
    """Put what stands beside the messages into their empty parts, each kind in order. Raises RowError."""
    if not names:
        raise RowError(
            "media_missing", f"{holes} parts have a picture or recording that the row does not hold"
        )
    left = {sound: iter([name for name in names if is_sound(name) == sound]) for sound in PLACES}
    wanted = [is_sound(name) for message in messages for name in message.media]
    if len(wanted) != holes or Counter(wanted) != Counter(map(is_sound, names)):
        raise RowError("media_place", f"the row holds {len(names)} {_kinds(names)} for {holes} empty parts")
    return [
        msgspec.structs.replace(message, media=tuple(next(left[is_sound(name)]) for name in message.media))
        for message in messages
    ]


def _kinds(names: list[str]) -> str:
    return " and ".join(sorted({f"{kind_of(name)}s" for name in names}))


def _place(text: str, names: list[str]) -> tuple[str, tuple[str, ...]]:
    """Put pictures where `<image>` stands in a text, recordings where `<audio>` does; else before it.

    Raises RowError.
    """
    marks, first = dict[str, Iterator[str]](), list[str]()
    for sound, mark in PLACES.items():
        mine = [name for name in names if is_sound(name) == sound]
        count = text.count(mark)
        if mine and count not in (0, len(mine)):
            raise RowError("media_place", f"{count} times {mark} in a text, for {len(mine)} {_kinds(mine)}")
        if mine and count:
            marks[mark] = iter(mine)
        else:
            first += mine
    ordered = [next(marks[mark]) for mark in re.findall("|".join(PLACES.values()), text) if mark in marks]
    for mark in marks:
        text = text.replace(mark, MEDIA_MARK)
    return MEDIA_MARK * len(first) + text, (*first, *ordered)


# --- values -------------------------------------------------------------------------------------------------


def _asked(value: Any, key: str, notes: Counter[str], *, role: str = "user") -> list[Message]:
    """Read a prompt or an answer that is text or a list of messages."""
    if value is None:
        raise RowError("missing_key" if role == "user" else "no_answer", f"`{key}` is missing")
    if isinstance(value, list):
        return read_turns(value, notes, where=key)
    return [_said(role, _text(value, key, notes))]


def _said(role: str, text: str) -> Message:
    reasoning, content = split_reasoning(text) if role == "assistant" else ("", text)
    return Message(role, content, reasoning=reasoning)


def _answer(row: RawRow, keys: tuple[str, ...], notes: Counter[str]) -> Message:
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        raise RowError("no_answer", f"`{'` or `'.join(keys)}` is missing; a row of this form needs it")
    found = _asked(row[key], key, notes, role="assistant")
    if len(found) != 1:
        raise RowError("no_answer", f"`{key}` holds {len(found)} messages, wanted one answer")
    return found[0]


def _text(value: Any, key: str, notes: Counter[str]) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):  # numbers and booleans, as of labels
        notes["value_as_text"] += 1
        return json.dumps(value)
    raise RowError("wrong_type", f"`{key}` is {type(value).__name__}, wanted text")


# --- one line of a file -------------------------------------------------------------------------------------


def read_row(line: bytes, *, most: int = MAX_LINE) -> RawRow:
    """Parse a line of less than `most` bytes as one JSON object, strictly. Raises RowError."""
    if len(line) >= most:
        raise RowError("line_too_long", f"the line has 1 MiB or more; at most {most - 1} bytes are read")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise RowError("invalid_utf8", f"byte {error.start + 1} is no UTF-8") from None
    try:
        row = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except json.JSONDecodeError as error:
        raise RowError("invalid_json", f"no valid JSON: {error}") from None
    except RecursionError:
        raise RowError("too_deep", f"over {MOST_DEPTH} levels of nesting") from None
    if not isinstance(row, dict):
        raise RowError("no_object", f"a {type(row).__name__}, wanted an object")
    if line.count(b"[") + line.count(b"{") > MOST_DEPTH and _depth(row) > MOST_DEPTH:
        raise RowError("too_deep", f"over {MOST_DEPTH} levels of nesting")
    return row


def _object(pairs: list[tuple[str, Any]]) -> RawRow:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for twice, _ in pairs:
            if twice in seen:
                break
            seen.add(twice)
        raise RowError(
            "duplicate_key",
            f"the key {twice[:40]!r} stands there twice; which one counts depends on the reader",
        )
    return made


def _constant(name: str) -> float:
    raise RowError("not_finite", f"{name} is no JSON")


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise RowError("huge_number", f"{text[:40]} is beyond what a number can hold")
    return number


def _int(text: str) -> int:
    if len(text) > 20:  # no 64-bit integer is longer
        raise RowError("huge_number", f"a number of {len(text)} digits")
    return int(text)


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [
            part
            for one in level
            for part in (one.values() if isinstance(one, dict) else one)
            if isinstance(part, dict | list)
        ]
    return deepest
