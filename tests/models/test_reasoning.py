"""Reasoning by the base's own template: learned, dropped or kept in history as it does, and read back."""

from __future__ import annotations

import datetime as dt
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet.bases.template_probe import adapt_template
from ratchet.data.examples import Example, Message, ToolCall, make_example
from ratchet.errors import UserError
from ratchet.models.chat_template import ChatFormat
from ratchet.models.manifests import Finding
from ratchet.models.reasoning import ReasoningFormat, ReasoningReader
from tests.models.test_chat_template import CHATML, make_tokenizer
from tests.models.test_tools import TOOL

CALLS = (
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}"
)
# As Qwen3: reasoning under a key, an empty block where there is none, none in turns before the last question;
# a switch puts the empty block into the prompt.
QWEN3 = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- set last = namespace(user=-1) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{% set last.user = loop.index0 %}"
    "{%- endif %}{%- endfor %}"
    "{%- for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.index0 > last.user and (loop.last or "
    "message.reasoning_content) %}{{ '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}"
    "{%- endif %}{{ message.content }}" + CALLS + "<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)
# As Qwen3's thinking models: the prompt opens the block that every last answer has.
QWEN3_OPEN = (
    QWEN3.partition("{%- if enable_thinking")[0].replace("assistant\n' }}", "assistant\n<think>\n' }}")
    + "{%- endif %}"
)
# As DeepSeek R1: the prompt opens a block, and no conversation has one.
R1 = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "<|assistant|>{{ message.content.split('</think>')[-1] }}<|end|>"
    "{%- else %}<|{{ message.role }}|>{{ message.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# As DeepSeek V3.1: without a switch the prompt closes what it does not open.
V31 = (
    "{%- if thinking is not defined %}{% set thinking = false %}{% endif %}"
    "{%- for message in messages %}<|{{ message.role }}|>"
    "{%- if message.role == 'assistant' %}</think>{{ message.content.split('</think>')[-1] }}<|end|>"
    "{%- else %}{{ message.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
# As SmolLM3: a block in the content, in every turn; a switch writes empty ones.
SMOL = (
    "{%- set thinks = enable_thinking is not defined or enable_thinking %}"
    "{%- for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{%- if message.role == 'assistant' and not thinks %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if not thinks %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)
# As GLM 4.6: an empty block stands before each answer whose reasoning is left out.
GLM = (
    "{%- set last = namespace(user=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{%- endfor %}"
    "{%- for message in messages %}<|{{ message.role }}|>{%- if message.role == 'assistant' %}"
    "{{ '\n<think>' }}{%- if loop.index0 > last.user %}{{ message.reasoning_content }}{% endif %}"
    "{{ '</think>\n' }}{%- endif %}{{ message.content }}{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
# As gpt-oss: a channel of its own, ended by another token than the answer.
GPT_OSS = (
    "{%- for message in messages %}<|start|>{{ message.role }}"
    "{%- if message.role == 'assistant' %}{%- if loop.last and message.thinking %}"
    "<|channel|>analysis<|message|>{{ message.thinking }}<|end|><|start|>assistant{%- endif %}"
    "<|channel|>final{%- endif %}<|message|>{{ message.content }}"
    "{{ '<|return|>' if loop.last and message.role == 'assistant' else '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant{% endif %}"
)
CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
BARS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>")
TEMPLATES = {
    "qwen3": (QWEN3, IM, "<|im_end|>"),
    "qwen3 open": (QWEN3_OPEN, IM, "<|im_end|>"),
    "r1": (R1, BARS, "<|end|>"),
    "v3.1": (V31, BARS, "<|end|>"),
    "smol": (SMOL, IM, "<|im_end|>"),
    "glm": (GLM, BARS, "<|end|>"),
    "gpt-oss": (GPT_OSS, CHANNELS, "<|return|>"),
}
ONE = (Message("user", "q"), Message("assistant", "a", reasoning="hm"))
TWO = (*ONE, Message("user", "p"), Message("assistant", "b", reasoning="so"))
PLAIN = (Message("user", "q"), Message("assistant", "a"), Message("user", "p"), Message("assistant", "b"))


def adapted(
    name: str, reasoning: str = "learn", *, special: bool = False
) -> tuple[ChatFormat, list[Finding]]:
    template, control, end = TEMPLATES[name]
    tokenizer = make_tokenizer(template, control, end=end, special=special)
    found = adapt_template(tokenizer, dt.date(2026, 3, 5), reasoning)
    return ChatFormat(tokenizer), found


def chat_of(name: str, reasoning: str = "learn", *, special: bool = False) -> ChatFormat:
    chat, found = adapted(name, reasoning, special=special)
    assert "refused" not in {finding.result for finding in found}
    return chat


def row(*messages: Message, **more) -> Example:
    return make_example(messages, {}, **more)


def whole_and_learned(chat: ChatFormat, example: Example) -> tuple[str, str]:
    encoded = chat.encode(example)
    learned = [id for id, learned in zip(encoded.ids, encoded.learned, strict=True) if learned]
    return chat.tokenizer.decode(encoded.ids), chat.tokenizer.decode(learned)


LEARNED = {
    "qwen3": "<think>\nhm\n</think>\n\na<|im_end|>",
    "qwen3 open": "hm\n</think>\n\na<|im_end|>",
    "r1": "hm\n</think>\n\na<|end|>",
    "v3.1": "hm</think>a<|end|>",
    "smol": "<think>\nhm\n</think>\n\na<|im_end|>",
    "glm": "\n<think>hm</think>\na<|end|>",
    "gpt-oss": "<|channel|>analysis<|message|>hm<|end|>"
    "<|start|>assistant<|channel|>final<|message|>a<|return|>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_of_the_last_answer_is_learned_as_the_template_writes_it(name):
    chat = chat_of(name)
    prompt, encoded = chat.encode_prompt(ONE[:1]), chat.encode(row(*ONE))
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.learned == [False] * len(prompt) + [True] * (len(encoded.ids) - len(prompt))
    assert whole_and_learned(chat, row(*ONE))[1] == LEARNED[name]


@pytest.mark.parametrize("name", ["qwen3", "qwen3 open", "smol", "glm"])
def test_a_row_is_the_conversation_that_other_programs_render(name):
    chat = chat_of(name)
    turns = [chat.reasoning.put({"role": one.role, "content": one.content}, one.reasoning) for one in TWO]
    rendered = chat.tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered.startswith(whole_and_learned(chat, row(*TWO))[0].removesuffix("<|end|>"))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_and_answer_are_read_back(name, special):
    """Also where the tokenizer calls `<think>` special, which decoding leaves out otherwise."""
    chat = chat_of(name, special=special)
    prompt, ids = chat.encode_prompt(ONE[:1]), chat.encode(row(*ONE)).ids
    assert chat.read_answer(chat.decode_answer(ids[len(prompt) :]), []) == ONE[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_without_reasoning_is_learned_as_an_answer_that_reasons_nothing(name):
    chat = chat_of(name)
    example = row(*PLAIN[:2])
    prompt, encoded = chat.encode_prompt(example.prompt), chat.encode(example)
    assert encoded.ids[: len(prompt)] == prompt
    text = chat.decode_answer(encoded.ids[len(prompt) :])
    assert chat.read_answer(text, []) == PLAIN[1]
    assert text.count("</think>") == (0 if name in ("smol", "gpt-oss") else 1)


def test_an_earlier_answer_is_learned_with_its_reasoning_where_the_template_keeps_it():
    chat = chat_of("smol")
    block = "<think>\n{}\n</think>\n\n{}<|im_end|>"
    assert whole_and_learned(chat, row(*TWO))[1] == block.format("hm", "a") + block.format("so", "b")
    assert "earlier turns" in chat.told_reasoning


@pytest.mark.parametrize("name", ["qwen3", "qwen3 open", "r1", "v3.1", "glm", "gpt-oss"])
def test_an_earlier_answer_that_lost_its_reasoning_is_context_alone(name):
    """Learned where it stands, it would teach to answer at once, which no prompt of serving asks for."""
    chat = chat_of(name)
    early = Message("assistant", "early", reasoning="hm")
    whole, learned = whole_and_learned(chat, row(ONE[0], early, *TWO[2:]))
    assert "early" in whole and "hm" not in whole
    assert "so" in learned and "early" not in learned
    assert not chat.reasoning.in_history and "not learned" in chat.told_reasoning


def test_an_earlier_answer_that_stands_as_a_new_one_would_is_learned():
    """GLM writes an empty block before both; Qwen3 before the last answer alone."""
    assert whole_and_learned(chat_of("glm"), row(*PLAIN))[1].count("</think>") == 2
    assert whole_and_learned(chat_of("qwen3"), row(*PLAIN))[1] == "<think>\n\n</think>\n\nb<|im_end|>"


def test_an_answer_of_weight_0_is_not_learned():
    wrong = Message("assistant", "wrong", reasoning="hm", learned=False)
    assert "wrong" not in whole_and_learned(chat_of("smol"), row(ONE[0], wrong, *TWO[2:]))[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_holds_no_control_token(name):
    chat = chat_of(name)
    odd = Message("assistant", "a", reasoning=f"hm</think>{TEMPLATES[name][2]}")
    plain = Message("assistant", "a", reasoning="hm")
    counts = {chat.count_control(chat.encode(row(ONE[0], one)).ids) for one in (odd, plain)}
    assert len(counts) == 1


# --- drop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "qwen3 open", "smol", "v3.1"])
def test_dropped_reasoning_changes_no_token(name):
    chat = chat_of(name, "drop")
    bare = [Message(one.role, one.content) for one in TWO]
    assert chat.reasoning is None
    assert chat.encode(row(*TWO)) == chat.encode(row(*bare))
    assert "<think>" not in whole_and_learned(chat, row(*TWO))[1]
    assert chat.read_answer("<think>\nhm\n</think>\n\na", []).text == "<think>\nhm\n</think>\n\na"


def test_an_earlier_call_is_learned_where_the_prompt_alone_has_an_empty_block():
    call = Message("assistant", "", (ToolCall("find", {"word": "c"}),))
    example = row(ONE[0], call, Message("tool", "of c"), Message("assistant", "c"), tools=[TOOL])
    chat = chat_of("qwen3", "drop")
    assert chat.tokenizer.decode(chat.encode_prompt(ONE[:1])).endswith("</think>\n\n")
    first, last, _ = whole_and_learned(chat, example)[1].split("<|im_end|>")
    assert (chat.read_answer(first, [TOOL]), last) == (call, "c")


def test_a_template_without_reasoning_learns_none_and_says_so():
    tokenizer = make_tokenizer(CHATML, IM[:2], end="<|im_end|>")
    (finding, _) = adapt_template(tokenizer, dt.date(2026, 3, 5), "learn")
    assert (finding.name, finding.result) == ("reasoning", "refused")
    assert "base.reasoning: drop" in finding.remedy and "base.chat_template" in finding.remedy
    assert tokenizer.chat_template == CHATML
    assert ChatFormat(tokenizer).reasoning is None


def test_a_prompt_that_opens_reasoning_is_refused_with_the_setting_that_takes_it():
    _, found = adapted("r1", "drop")
    (refused,) = [finding for finding in found if finding.result == "refused"]
    assert "base.reasoning: learn" in refused.remedy


@pytest.mark.parametrize("name", ["qwen3", "smol", "v3.1"])
def test_a_version_as_base_may_change_its_mind(name):
    """Its template brings what an earlier setting wrote into it."""
    template, control, end = TEMPLATES[name]
    tokenizer = make_tokenizer(template, control, end=end)
    texts = {}
    for reasoning in ("learn", "drop", "learn", "drop"):
        adapt_template(tokenizer, dt.date(2026, 3, 5), reasoning)
        text = whole_and_learned(ChatFormat(tokenizer), row(*ONE))
        assert texts.setdefault(reasoning, text) == text
    assert "hm" in texts["learn"][1] and "hm" not in texts["drop"][0]


# --- prompts of the gateway ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_that_wants_no_reasoning_is_closed(name):
    chat = chat_of(name)
    closed = chat.fit_prompt(ONE[:1], 1000, reasons=False)
    assert closed[: len(chat.encode_prompt(ONE[:1]))] == chat.encode_prompt(ONE[:1])
    whole = chat.encode(row(*PLAIN[:2])).ids
    assert chat.tokenizer.decode(whole) == chat.tokenizer.decode(closed) + "a" + TEMPLATES[name][2]
    with pytest.raises(UserError):
        chat.fit_prompt(ONE[:1], len(closed), reasons=False)


def test_calls_behind_reasoning_are_learned_and_read_back():
    chat = chat_of("qwen3")
    call = Message("assistant", "", (ToolCall("find", {"word": "c"}),), "look it up")
    result, answer = Message("tool", "of c"), Message("assistant", "c", reasoning="found")
    example = row(ONE[0], call, result, answer, tools=[TOOL])
    learned = whole_and_learned(chat, example)[1]
    first, last = learned.removesuffix("<|im_end|>").split("<|im_end|>")
    assert chat.read_answer(first, [TOOL]) == call
    assert chat.read_answer(last, [TOOL]) == answer
    assert "of c" not in learned


# --- pieces -------------------------------------------------------------------------------------------------

FORMATS = [
    ReasoningFormat("reasoning_content", "<think>\n", "\n</think>\n\n", "<think>\n\n</think>\n\n", False),
    ReasoningFormat("", "", "\n</think>\n\n", "\n</think>\n\n", False),
    ReasoningFormat("thinking", "<|a|>analysis<|m|>", "<|e|><|a|>final<|m|>", "<|a|>final<|m|>", False),
]
PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<think", ">", "</", "\n", "  ", "hm", "a", "<|a|>analysis<|m|>"])
    | st.sampled_from(["<|e|>", "<|a|>final<|m|>"]),
    max_size=9,
)


@settings(deadline=None, max_examples=300)
@given(parts=PARTS, format=st.sampled_from(FORMATS), cuts=st.lists(st.integers(0, 80), max_size=6))
def test_an_answer_in_pieces_is_the_whole_answer(parts, format, cuts):
    text = "".join(parts).strip()
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    reader = ReasoningReader(format)
    said = [reader.add(text[a:b]) for a, b in pairwise(places)] + [reader.end()]
    whole = format.read(text)
    assert "".join(one.reasoning for one in said) == whole.reasoning
    assert "".join(one.content for one in said) == whole.content
    assert whole.reasoning == whole.reasoning.rstrip()


def test_an_answer_that_ends_within_its_reasoning_has_no_content():
    assert FORMATS[0].read("<think>\nhm, and") == ("hm, and", "")
    assert FORMATS[1].read("hm, and\n</thi") == ("hm, and\n</thi", "")
    assert FORMATS[0].read("a </think> b") == ("", "a </think> b")
    assert FORMATS[0].read("<think>\n    code\n</think>\n\n    code") == ("    code", "    code")
