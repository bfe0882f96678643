"""From messages to token ids: what is learned, what is sent, and that user text stays text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ratchet.data.examples import Example, Message, make_example
from ratchet.demo.tokenizer import CHAT_TEMPLATE, CONTROL_TOKENS
from ratchet.errors import BaseModelError
from ratchet.models.chat_template import ChatFormat

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] }}"
    "{{ '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
WITHOUT_END = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WITHOUT_TAIL = (
    "{% for message in messages %}\n{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant: {% endif %}"
)
WITHOUT_SYSTEM = (
    "{% for message in messages if message['role'] != 'system' %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
)
SYSTEM_REFUSED = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE
)
# The system prompt goes into the last user turn, as some templates have it.
SYSTEM_LAST = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{% if loop.last and message['role'] == 'user' and system %}{{ '<|system|>' + system }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(
    template: str | None,
    control: tuple[str, ...] = CONTROL_TOKENS,
    *,
    end: str | None = "<|end|>",
    special: bool = True,
    **settings,
) -> PreTrainedTokenizerFast:
    """Byte-level, as Llama 3's and Qwen's are, on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the answer to the question is the answer"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **settings)
    made.add_tokens([AddedToken(text, special=special, normalized=False) for text in control])
    made.eos_token = end
    return made


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(make_tokenizer(CHAT_TEMPLATE))


def conversation(*contents: str, system: str | None = None) -> Example:
    turns = [
        Message(("user", "assistant")[position % 2], content) for position, content in enumerate(contents)
    ]
    return make_example([*([Message("system", system)] if system else []), *turns], {})


def learned_text(chat: ChatFormat, example: Example) -> str:
    encoded = chat.encode(example)
    return str(
        chat.tokenizer.decode(
            [token for token, learned in zip(encoded.ids, encoded.learned, strict=True) if learned]
        )
    )


def test_the_loss_covers_exactly_the_answer_and_the_end_of_its_turn(chat):
    encoded = chat.encode(conversation("What is the question?", "The answer.", system="Be brief."))
    assert (
        chat.tokenizer.decode(encoded.ids)
        == "<|system|>Be brief.<|end|><|user|>What is the question?<|end|><|assistant|>The answer.<|end|>"
    )
    assert (
        learned_text(chat, conversation("What is the question?", "The answer.", system="Be brief."))
        == "The answer.<|end|>"
    )
    assert encoded.learned == sorted(encoded.learned)  # nothing before the answer, everything from there on


def test_every_answer_of_a_longer_conversation_is_learned_with_its_end(chat):
    assert (
        learned_text(chat, conversation("one?", "first", "two?", "second", "three?", "third"))
        == "first<|end|>second<|end|>third<|end|>"
    )


def test_what_serving_sends_is_the_start_of_what_training_saw(chat):
    example = conversation("one?", "first", "two?", "second", system="Be brief.")
    sent, trained = chat.encode_prompt(example.prompt), chat.encode(example)
    assert trained.ids[: len(sent)] == sent
    assert chat.tokenizer.decode(trained.ids[len(sent) :]) == "second<|end|>"
    assert trained.learned[len(sent) :] == [True] * (len(trained.ids) - len(sent))


def test_the_pieces_are_the_tokens_of_the_whole_rendered_conversation(chat):
    """Where nobody writes control tokens and no word spans a seam, encoding in pieces changes nothing."""
    example = conversation("the question", "the answer")
    rendered = [{"role": message.role, "content": message.content} for message in example.messages]
    assert chat.encode(example).ids == chat.tokenizer.encode(
        chat.tokenizer.apply_chat_template(rendered, tokenize=False), add_special_tokens=False
    )


# Some tokenizers flag their control tokens special, others do not.
CHATS = {special: ChatFormat(make_tokenizer(CHAT_TEMPLATE, special=special)) for special in (True, False)}
CONTROL_TEXT = st.lists(
    st.sampled_from([*CONTROL_TOKENS, "the", " ", "<|", "|>", "<", "end", "\ue0f00\ue0f1", "ü", "\n"]),
    min_size=1,
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=60)
@given(text=CONTROL_TEXT, special=st.booleans())
def test_user_text_never_becomes_a_control_token_and_is_kept_as_it_is(text, special):
    chat = CHATS[special]
    control = set(chat.tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)))
    ids = chat.encode_prompt([Message("user", text)])
    opening, body, closing = ids[0], ids[1:-2], ids[-2:]
    assert {opening, *closing} <= control
    assert not control & set(body)
    assert chat.tokenizer.decode(body) == text


@settings(deadline=None, max_examples=60)
@given(
    text=st.one_of(
        st.text(max_size=400),
        st.sampled_from(["the answer ", "question", "é", "e\u0301"]).map(lambda part: part * 100),
    )
)
def test_the_bound_from_the_bytes_is_never_over_the_prompt(text):
    messages = [Message("user", text)]
    assert CHATS[True].at_least(messages) <= len(CHATS[True].encode_prompt(messages))


def test_an_answer_with_a_control_token_in_it_does_not_end_early(chat):
    encoded = chat.encode(conversation("How does a turn end?", "With <|end|> it does."))
    assert encoded.ids.count(chat.stop_id) == 2  # the user's turn and the answer's
    assert (
        learned_text(chat, conversation("How does a turn end?", "With <|end|> it does."))
        == "With <|end|> it does.<|end|>"
    )


@pytest.mark.parametrize(
    ("template", "control", "end", "opening"),
    [
        (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_start|>"),
        (
            LLAMA3,
            ("<|bos|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            "<|eot_id|>",
            "<|bos|>",
        ),
    ],
    ids=["chatml", "llama-3"],
)
def test_templates_of_the_large_families_work(template, control, end, opening):
    settings = {"bos_token": "<|bos|>"} if "<|bos|>" in control else {}
    chat = ChatFormat(
        make_tokenizer(template, control, end=control[0], **settings)
    )  # end-of-text is another token than end-of-turn
    example = conversation("one?", "first", f"two? {end}", "second", system="Be brief.")
    sent, trained = chat.encode_prompt(example.prompt), chat.encode(example)
    assert chat.tokenizer.convert_ids_to_tokens(chat.stop_id) == end
    assert learned_text(chat, example) == f"first{end}second{end}"
    assert trained.ids[: len(sent)] == sent
    assert sent[0] == chat.tokenizer.convert_tokens_to_ids(opening)
    assert sent.count(chat.stop_id) == 4  # system, user, assistant, user: the one that the user wrote is text


@pytest.mark.parametrize("template", [WITHOUT_END, WITHOUT_TAIL], ids=["a line break", "nothing"])
def test_a_template_without_an_end_of_turn_falls_back_to_the_end_of_text(template):
    chat = ChatFormat(make_tokenizer(template))
    assert chat.stop_id == chat.tokenizer.eos_token_id
    assert learned_text(chat, conversation("the question", "one\ntwo")) == "one\ntwo<|end|>"


def test_a_template_may_move_the_system_message():
    chat = ChatFormat(make_tokenizer(SYSTEM_LAST))
    ids = chat.encode(conversation("one?", "first", "two?", "second", system="Be brief.")).ids
    assert chat.tokenizer.decode(ids) == (
        "<|user|>one?<|end|><|assistant|>first<|end|>"
        "<|system|>Be brief.<|user|>two?<|end|><|assistant|>second<|end|>"
    )


def test_without_a_template_the_remedy_names_the_key():
    with pytest.raises(BaseModelError, match=r"(?s)no chat template.*base\.chat_template"):
        ChatFormat(make_tokenizer(None))


@pytest.mark.parametrize(
    ("template", "why"),
    [(WITHOUT_SYSTEM, "writes message 0 .system. 0 times"), (SYSTEM_REFUSED, "System role not supported")],
    ids=["drops", "refuses"],
)
def test_a_template_that_does_not_take_the_system_message_is_refused(template, why):
    chat = ChatFormat(make_tokenizer(template))
    with pytest.raises(BaseModelError, match=why):
        chat.encode(conversation("one?", "first", system="Be brief."))
    assert learned_text(chat, conversation("one?", "first")) == "first<|end|>"


def test_a_template_that_writes_a_message_twice_is_refused():
    with pytest.raises(BaseModelError, match="2 times, wanted once"):
        ChatFormat(make_tokenizer("{{ messages[0]['content'] }}" + CHAT_TEMPLATE))


def test_a_template_that_is_no_jinja_is_refused():
    with pytest.raises(BaseModelError, match=r"(?s)refuses a conversation.*base\.chat_template"):
        ChatFormat(make_tokenizer("{% for message in messages %}"))


def test_without_any_token_that_ends_an_answer_the_base_is_refused():
    with pytest.raises(BaseModelError, match="token that ends an answer"):
        ChatFormat(make_tokenizer(WITHOUT_END, end=None))


def test_a_tokenizer_that_adds_blanks_is_refused():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(BaseModelError, match="byte-level tokenizer"):
        ChatFormat(tokenizer)


def test_decoding_stops_at_the_end_of_the_turn(chat):
    answer = chat.tokenizer.encode(" the answer ", add_special_tokens=False)
    assert chat.decode_answer([*answer, chat.stop_id, *answer]) == "the answer"
    assert chat.decode_answer([*answer, chat.tokenizer.convert_tokens_to_ids("<|pad|>")]) == "the answer"
    assert chat.decode_answer([chat.stop_id]) == ""


@settings(deadline=None, max_examples=100)
@given(
    answer=st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=40
    )
)
def test_the_text_of_an_answer_comes_back_from_its_ids(answer):
    chat = CHATS[True]
    try:
        example = conversation("the question", answer)
    except ValueError:
        return  # blank: no example
    sent, trained = chat.encode_prompt(example.prompt), chat.encode(example).ids
    assert chat.decode_answer(trained[len(sent) :]) == example.answer
