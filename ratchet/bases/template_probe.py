"""Check a base's chat template, and adapt it where a fault can be repaired permanently.

Adaptations are written into the template itself, so that training, gateway, exports and other programs all
render the same text.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import TYPE_CHECKING, Literal

from ratchet.data.examples import Message
from ratchet.errors import BaseModelError
from ratchet.models.chat_template import ChatFormat, find_content_form, opening_gap, render
from ratchet.models.manifests import Finding
from ratchet.models.reasoning import LEARN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ratchet.models.processors import MediaProcessor
    from ratchet.models.reasoning import ReasoningFormat

ASKED_DATE = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)")
# Variables with which templates switch reasoning on or off in their generation prompt.
SWITCHES = ("enable_thinking", "thinking")
SWITCHED = re.compile(rf"\A\{{%- set ({'|'.join(SWITCHES)}) = (true|false) %\}}")  # as `_switch` writes it
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "", "parameters": {"type": "object", "properties": {}}},
}


def adapt_template(
    tokenizer: PreTrainedTokenizerBase,
    day: dt.date,
    reasoning: Literal["drop", "learn"] = "drop",
    processor: MediaProcessor | None = None,
) -> list[Finding]:
    """Adapt the tokenizer's template where needed, and return the findings.

    `day` is the date for a template that asks for today's; `reasoning` is `base.reasoning`; `processor` is
    that of a base that reads pictures or sound.
    """
    open_answers = _learn_reasoning if reasoning == "learn" else _fix_opening
    return [
        *_choose(tokenizer),
        *_fix_date(tokenizer, day),
        *open_answers(tokenizer, processor),
        *_prove(tokenizer, processor),
    ]


def _choose(tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Keep only the default of several named templates."""
    named = tokenizer.chat_template
    if not isinstance(named, dict):
        return []
    names = ", ".join(sorted(named))
    if "default" not in named:
        return [
            Finding(
                "templates",
                "refused",
                f"it brings the named templates {names}, and none is called default",
                "name one of your own in `base.chat_template`",
            )
        ]
    tokenizer.chat_template = named["default"]
    return [Finding("templates", "adapted", f"of its named templates ({names}) the default one is used")]


def _fix_date(tokenizer: PreTrainedTokenizerBase, day: dt.date) -> list[Finding]:
    """Define the function for today's date, `strftime_now`, in the template itself, with a fixed day.

    Otherwise prompts in service would differ from those in training as soon as the day changes.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" not in template:
        return []
    asked = {match[2] for match in ASKED_DATE.finditer(template)}
    if len(ASKED_DATE.findall(template)) < template.count("strftime_now("):
        return [
            Finding(
                "date",
                "refused",
                "the template writes today's date in a format that it makes up while rendering",
                "name a template in `base.chat_template` that writes no date, or a fixed one",
            )
        ]
    moment = dt.datetime.combine(day, dt.time())
    said = json.dumps({format: moment.strftime(format) for format in sorted(asked)}, ensure_ascii=False)
    tokenizer.chat_template = (
        f"{{%- macro strftime_now(format) %}}{{{{ {said}[format] }}}}{{% endmacro %}}{template}"
    )
    return [
        Finding("date", "adapted", f"the template asks for today's date; it is {day} for good (`base.date`)")
    ]


def _learn_reasoning(tokenizer: PreTrainedTokenizerBase, processor: MediaProcessor | None) -> list[Finding]:
    """Mark a template that writes reasoning as one whose reasoning is learned; switch it on if needed."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return []  # `_choose` refused it
    bare = SWITCHED.sub("", template.removeprefix(LEARN))
    on = [_switch(name, "true") + bare for name in SWITCHES if name in bare]
    for candidate in (bare, *on):
        tokenizer.chat_template = LEARN + candidate
        if found := _reasoning(tokenizer, processor):
            kept = "earlier answers keep theirs" if found.in_history else "earlier answers stand without"
            before = "opened by the prompt" if found.opened else f"after {found.before!r}"
            what = f"it is learned and given, {before}, up to {found.after!r}; {kept}"
            return [Finding("reasoning", "adapted", what)]
    tokenizer.chat_template = template
    return [
        Finding(
            "reasoning",
            "refused",
            "`base.reasoning` is learn, and the chat template writes no reasoning of an answer",
            "take a base that reasons, name a template in `base.chat_template` that writes the key "
            "`reasoning_content` of assistant messages, or set `base.reasoning: drop`",
        )
    ]


def _reasoning(
    tokenizer: PreTrainedTokenizerBase, processor: MediaProcessor | None
) -> ReasoningFormat | None:
    try:
        return ChatFormat(tokenizer, processor=processor).reasoning
    except BaseModelError:
        return None  # `_prove` refuses it


def _switch(name: str, value: str) -> str:
    return f"{{%- set {name} = {value} %}}"


def _fix_opening(tokenizer: PreTrainedTokenizerBase, processor: MediaProcessor | None) -> list[Finding]:
    """Adapt the template so that a prompt with its answer, without reasoning, begins the conversation."""
    template = tokenizer.chat_template
    if isinstance(template, str) and template.startswith(LEARN):  # a version that learned it
        tokenizer.chat_template = template = SWITCHED.sub("", template.removeprefix(LEARN))
    if not isinstance(template, str) or (gap := _gap(tokenizer, processor)) == "":
        return []
    for name in SWITCHES:
        if name not in template:
            continue
        tokenizer.chat_template = _switch(name, "false") + template
        if _gap(tokenizer, processor) == "":
            what = (
                f"answers are learned and given without reasoning: the template has {name} = false for good"
            )
            return [Finding("opening", "adapted", what)]
    if gap:
        opening = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(gap)} }}}}{{% endif %}}"
        tokenizer.chat_template = template + opening
        if _gap(tokenizer, processor) == "":
            what = f"the template opens no answer; the prompt now ends with {gap!r}, as conversations go on"
            return [Finding("opening", "adapted", what)]
    tokenizer.chat_template = template
    return []  # `_prove` refuses it


def _gap(tokenizer: PreTrainedTokenizerBase, processor: MediaProcessor | None) -> str | None:
    try:
        return opening_gap(tokenizer, find_content_form(tokenizer, processor))
    except BaseModelError:
        return None


def _prove(tokenizer: PreTrainedTokenizerBase, processor: MediaProcessor | None) -> list[Finding]:
    if isinstance(tokenizer.chat_template, dict):
        return []  # `_choose` refused it
    try:
        chat = ChatFormat(tokenizer, processor=processor)
        chat.prove()
    except BaseModelError as error:
        return [Finding("template", "refused", str(error).partition("\n")[0], error.remedy)]
    template = str(tokenizer.chat_template)
    takes = {
        "system messages": _takes_system(chat),
        "tools": chat.takes_tools if processor else _takes_tools(tokenizer),
        "reasoning": any(word in template for word in ("reasoning_content", "<think>", *SWITCHES)),
    }
    takes |= dict.fromkeys(chat.reads, True)
    said = [f"{name} {'yes' if taken else 'no'}" for name, taken in takes.items()]
    return [Finding("template", "ok", f"a prompt and its answer begin the conversation; {', '.join(said)}")]


def _takes_system(chat: ChatFormat) -> bool:
    try:
        return bool(chat.encode_prompt([Message("system", "a"), Message("user", "b")]))
    except BaseModelError:
        return False


def _takes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    asked = [{"role": "user", "content": "a"}]
    try:
        return "look_up" in render(tokenizer, asked, opening=True, tools=[TOOL])
    except (BaseModelError, TypeError, ValueError):
        return False
