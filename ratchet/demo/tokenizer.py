"""Train the tokenizers of the demo's models; nothing here loads PEFT, which takes ten seconds of CPU time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTROL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    context: int,
    chat_template: str = CHAT_TEMPLATE,
    control: Sequence[str] = CONTROL_TOKENS,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; `control` are its control tokens, CONTROL_TOKENS among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(control),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # its class has no annotations
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",  # noqa: S106  (no secret: the name of a token)
        eos_token="<|end|>",  # noqa: S106
        extra_special_tokens=[token for token in control if token not in ("<|pad|>", "<|end|>")],
        model_max_length=context,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
