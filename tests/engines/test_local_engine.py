"""The engine `local` on the tiny base: independent answers, versions that never mix, reported faults."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import scaled
from safetensors.torch import load_file, save_file

from ratchet.config.params import Config
from ratchet.data.examples import Message, read_examples
from ratchet.engines.decoding import Decoder
from ratchet.engines.local_engine import LocalEngine
from ratchet.engines.transcript import Transcript
from ratchet.errors import BaseModelError, BusyError, ServiceError, UserError
from ratchet.models.chat_template import ChatFormat
from ratchet.models.generation import answer_likelihoods, greedy_answers
from ratchet.models.loading import WEIGHTS, load_adapter, load_base, load_tokenizer
from ratchet.serving.bundle import Bundle, Generation
from ratchet.serving.engine import Ask, Ended, Piece

LENGTH = 96


@pytest.fixture(scope="module")
def other(candidate: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another version: the candidate's adapter turned round and made ten times as strong."""
    folder = tmp_path_factory.mktemp("other") / "adapter"
    shutil.copytree(candidate, folder)
    change_weights(folder, lambda name, weight: weight * (-10 if "lora_B" in name else 1))
    return folder


def change_weights(folder: Path, change: Any) -> None:
    weights = {name: change(name, weight) for name, weight in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def bundle(version: int, adapter: Path, base: Path) -> Bundle:
    return Bundle("tiny", version, adapter, base, LENGTH, Generation(8))


@pytest.fixture(scope="module")
def prompts(prepared: Path) -> list[tuple[Message, ...]]:
    return [tuple(row.prompt) for row in list(read_examples(prepared / "test.jsonl"))[:24]]


def alone(prompts: list[tuple[Message, ...]], adapter: Path, base: Path, tokens: int = 8) -> list[str]:
    """What evaluation would say."""
    model, chat = load_adapter(load_base(base), adapter).eval(), ChatFormat(load_tokenizer(base))
    return greedy_answers(
        model, [chat.encode_prompt(prompt) for prompt in prompts], chat, max_new_tokens=tokens, batch_size=1
    )


async def take(engine: LocalEngine, ask: Ask) -> tuple[str, Ended, int]:
    """The answer, its end, and the number of its pieces."""
    pieces = [piece async for piece in engine.answer(ask)]
    assert isinstance(pieces[-1], Ended)
    texts = [piece.text for piece in pieces if isinstance(piece, Piece)]
    return "".join(texts), pieces[-1], len(texts)


def ask(number: int, prompt: tuple[Message, ...], version: int = 1, **settings: Any) -> Ask:
    return Ask(f"r{number}", version, prompt, **settings)


def run(work: Any, *bundles: Bundle, **gateway: Any) -> Any:
    """`work(engine)` with these versions loaded, the engine closed behind it."""

    async def whole() -> Any:
        engine = LocalEngine(Config.model_validate({"gateway": gateway}))
        try:
            for one in bundles:
                await engine.load(one)
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(whole())


def test_answers_are_those_of_the_evaluation_whoever_else_is_in_the_batch(
    candidate: Path, tiny_base: Path, prompts: list[tuple[Message, ...]]
) -> None:
    async def all_at_once(engine: LocalEngine) -> list[tuple[str, Ended, int]]:
        return await asyncio.gather(
            *(
                take(engine, ask(number, prompt, max_tokens=4 + number % 5))
                for number, prompt in enumerate(prompts)
            )
        )

    found = run(all_at_once, bundle(1, candidate, tiny_base), max_batch=5)

    for number, (text, end, _) in enumerate(found):
        assert text == alone([prompts[number]], candidate, tiny_base, tokens=4 + number % 5)[0]
        assert end.answer_tokens <= 4 + number % 5


def test_versions_decoded_together_answer_as_each_does_alone(
    candidate: Path, other: Path, tiny_base: Path, prompts: list[tuple[Message, ...]]
) -> None:
    async def mixed(engine: LocalEngine) -> list[tuple[str, Ended, int]]:
        return await asyncio.gather(
            *(
                take(engine, ask(number, prompt, version=1 + number % 2))
                for number, prompt in enumerate(prompts)
            )
        )

    found = [text for text, _, _ in run(mixed, bundle(1, candidate, tiny_base), bundle(2, other, tiny_base))]

    wanted = {1: alone(prompts, candidate, tiny_base), 2: alone(prompts, other, tiny_base)}
    assert wanted[1] != wanted[2], "or the test would tell nothing"
    assert found == [wanted[1 + number % 2][number] for number in range(len(prompts))]


def test_long_prompts_that_join_by_parts_change_nothing(
    candidate: Path,
    other: Path,
    tiny_base: Path,
    prompts: list[tuple[Message, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def mixed(engine: LocalEngine) -> list[tuple[str, Ended, int]]:
        return await asyncio.gather(
            *(
                take(engine, ask(number, prompt, version=1 + number % 2))
                for number, prompt in enumerate(prompts)
            )
        )

    versions = bundle(1, candidate, tiny_base), bundle(2, other, tiny_base)
    whole = run(mixed, *versions, max_batch=4)
    monkeypatch.setattr("ratchet.engines.decoding.PREFILL_TOKENS", 1)
    parts = run(mixed, *versions, max_batch=4)
    assert [text for text, _, _ in parts] == [text for text, _, _ in whole]
    assert [end.prompt_nll for _, end, _ in parts] == pytest.approx(
        [end.prompt_nll for _, end, _ in whole], rel=1e-4
    )


def test_a_version_that_is_unloaded_answers_no_more_and_the_others_do(
    candidate: Path, other: Path, tiny_base: Path, prompts: list[tuple[Message, ...]]
) -> None:
    async def unload(engine: LocalEngine) -> str:
        await engine.unload(1)
        with pytest.raises(ServiceError, match="v1 is not loaded"):
            await take(engine, ask(0, prompts[0]))
        return (await take(engine, ask(0, prompts[0], version=2)))[0]

    assert (
        run(unload, bundle(1, candidate, tiny_base), bundle(2, other, tiny_base))
        == alone(prompts[:1], other, tiny_base)[0]
    )


def test_the_prompts_surprise_is_that_of_the_evaluation(
    candidate: Path, tiny_base: Path, prompts: list[tuple[Message, ...]]
) -> None:
    model, chat = load_adapter(load_base(tiny_base), candidate).eval(), ChatFormat(load_tokenizer(tiny_base))
    encoded = [chat.encode_prompt(prompt) for prompt in prompts[:6]]
    from ratchet.models.chat_template import Encoded

    rows = [Encoded([*ids, chat.stop_id], [False] * len(ids) + [True]) for ids in encoded]
    wanted = [
        found.prompt_nll / found.prompt_tokens
        for found in answer_likelihoods(model, rows, pad_id=chat.pad_id, batch_size=1)
    ]

    async def together(engine: LocalEngine) -> list[tuple[str, Ended, int]]:
        return await asyncio.gather(
            *(take(engine, ask(number, prompt)) for number, prompt in enumerate(prompts[:6]))
        )

    found = [end.prompt_nll for _, end, _ in run(together, bundle(1, candidate, tiny_base))]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_full_queue_refuses_at_once(
    candidate: Path, tiny_base: Path, prompts: list[tuple[Message, ...]]
) -> None:
    async def flood(engine: LocalEngine) -> list[Any]:
        return await asyncio.gather(
            *(take(engine, ask(number, prompts[0])) for number in range(10)), return_exceptions=True
        )

    found = run(flood, bundle(1, candidate, tiny_base), max_batch=1, max_queue=3)
    assert sum(isinstance(one, BusyError) for one in found) == 6
    assert sum(isinstance(one, tuple) for one in found) == 4


def test_a_prompt_that_does_not_fit_is_refused_with_its_length(candidate: Path, tiny_base: Path) -> None:
    long = (Message("user", "word " * 400),)
    with pytest.raises(UserError, match=rf"the model takes {LENGTH} with the answer"):
        run(lambda engine: take(engine, ask(0, long)), bundle(1, candidate, tiny_base))


def test_a_huge_prompt_is_refused_before_it_is_tokenised(
    candidate: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte takes a second, in which nobody's stream goes on."""
    seen: list[int] = []
    encode = ChatFormat.encode_prompt
    monkeypatch.setattr(
        ChatFormat,
        "encode_prompt",
        lambda chat, messages: seen.append(len(messages[0].content)) or encode(chat, messages),
    )
    with pytest.raises(UserError, match=rf"over \d+ tokens; the model takes {LENGTH} with the answer"):
        run(
            lambda engine: take(engine, ask(0, (Message("user", "word " * 200_000),))),
            bundle(1, candidate, tiny_base),
        )
    assert seen == []


def test_an_answer_that_nobody_waits_for_frees_its_place(
    candidate: Path, tiny_base: Path, prompts: list[tuple[Message, ...]]
) -> None:
    async def leave(engine: LocalEngine) -> str:
        pieces = engine.answer(ask(0, prompts[0], max_tokens=60))
        await anext(pieces)
        await pieces.aclose()
        return (await asyncio.wait_for(take(engine, ask(1, prompts[1])), 20))[0]

    assert (
        run(leave, bundle(1, candidate, tiny_base), max_batch=1)
        == alone(prompts[1:2], candidate, tiny_base)[0]
    )


def test_a_seed_repeats_a_sampled_answer_and_a_stop_string_ends_one(
    candidate: Path, tiny_base: Path, prompts: list[tuple[Message, ...]]
) -> None:
    async def sample(engine: LocalEngine) -> list[str]:
        settings = [
            {"temperature": 1.5, "seed": 1},
            {"temperature": 1.5, "seed": 1},
            {"temperature": 1.5, "seed": 2, "top_p": 0.9},
        ]
        return [(await take(engine, ask(0, prompts[0], max_tokens=20, **one)))[0] for one in settings]

    first, again, another = run(sample, bundle(1, candidate, tiny_base))
    assert first == again != another

    stop = first[3:6]

    async def stopped(engine: LocalEngine) -> tuple[str, Ended, int]:
        return await take(engine, ask(0, prompts[0], max_tokens=20, temperature=1.5, seed=1, stop=(stop,)))

    text, end, _ = run(stopped, bundle(1, candidate, tiny_base))
    assert text == first[: first.index(stop)] and end.finish == "stop"


@pytest.mark.parametrize("fault", ["nan", "rank", "pissa", "vera", "shape", "base", "garbage"])
def test_a_broken_adapter_is_refused_with_its_reason_and_the_champion_serves_on(
    fault: str, candidate: Path, tiny_base: Path, tmp_path: Path, prompts: list[tuple[Message, ...]]
) -> None:
    broken = tmp_path / "adapter"
    shutil.copytree(candidate, broken)
    spoil(broken, fault)
    words = {
        "nan": "not finite",
        "rank": "rank is 4096",
        "pissa": "more than `adapter.method` offers: init_lora_weights",
        "vera": "more than `adapter.method` offers: peft_type 'VERA'",
        "shape": "does not fit the base",
        "base": "was trained on other/model",
        "garbage": "no safetensors file",
    }

    async def try_it(engine: LocalEngine) -> str:
        with pytest.raises(BaseModelError, match=words[fault]):
            await engine.load(bundle(2, broken, tiny_base))
        return (await take(engine, ask(0, prompts[0])))[0]

    assert run(try_it, bundle(1, candidate, tiny_base)) == alone(prompts[:1], candidate, tiny_base)[0]


def spoil(folder: Path, fault: str) -> None:
    if fault == "nan":
        change_weights(folder, lambda _, weight: torch.full_like(weight, float("nan")))
    elif fault == "shape":
        change_weights(folder, lambda _, weight: torch.zeros(weight.shape[0] + 1, weight.shape[1]))
    elif fault == "garbage":
        (folder / WEIGHTS).write_bytes(b"not a tensor" * 10)
    else:
        changes = {
            "rank": {"r": 4096},
            "pissa": {"init_lora_weights": "pissa"},
            "vera": {"peft_type": "VERA"},
            "base": {"base": {"model": "other/model", "revision": "f" * 40}},
        }
        name, change = "manifest.json" if fault == "base" else "adapter_config.json", changes[fault]
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))


def test_another_adapter_under_a_number_that_is_loaded_is_refused(
    candidate: Path, other: Path, tiny_base: Path
) -> None:
    async def twice(engine: LocalEngine) -> None:
        await engine.load(bundle(1, candidate, tiny_base))
        with pytest.raises(BaseModelError, match="another v1 is loaded"):
            await engine.load(bundle(1, other, tiny_base))

    run(twice, bundle(1, candidate, tiny_base))


def test_a_version_on_another_base_gets_a_model_of_its_own(
    candidate: Path, tiny_base: Path, tmp_path: Path, prompts: list[tuple[Message, ...]]
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")

    async def both(engine: LocalEngine) -> list[str]:
        said = [
            text
            for text, _, _ in await asyncio.gather(
                *(take(engine, ask(number, prompts[0], version=1 + number)) for number in range(2))
            )
        ]
        await engine.unload(2)
        return said

    assert len(set(run(both, bundle(1, candidate, tiny_base), bundle(2, candidate, tmp_path / "base")))) == 1


@pytest.mark.parametrize("part", ["_prefill", "_step"])
def test_a_model_that_fails_ends_those_answers_and_the_next_ones_come(
    part: str,
    candidate: Path,
    tiny_base: Path,
    prompts: list[tuple[Message, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        monkeypatch.undo()
        raise RuntimeError("out of memory\nin 3 GiB")

    async def fail_once(engine: LocalEngine) -> list[str]:
        monkeypatch.setattr(Decoder, part, fail)
        with pytest.raises(ServiceError, match="the model failed: out of memory"):
            await take(engine, ask(0, prompts[0], temperature=2.0, seed=0))
        return [(await take(engine, ask(1, prompts[0])))[0]]

    assert run(fail_once, bundle(1, candidate, tiny_base)) == alone(prompts[:1], candidate, tiny_base)


def test_who_is_under_way_when_the_engine_closes_is_told(
    candidate: Path, tiny_base: Path, prompts: list[tuple[Message, ...]]
) -> None:
    async def close(engine: LocalEngine) -> None:
        asked = [
            asyncio.create_task(take(engine, ask(number, prompts[0], max_tokens=60, temperature=2.0)))
            for number in range(20)
        ]
        await asyncio.sleep(0.05)
        await engine.close()
        found = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), scaled(10))
        assert {type(one) for one in found} <= {tuple, ServiceError} and any(
            isinstance(one, ServiceError) for one in found
        )
        with pytest.raises(ServiceError, match="the gateway stops"):
            await take(engine, ask(0, prompts[0]))

    run(close, bundle(1, candidate, tiny_base), max_batch=2)


def test_a_stream_is_the_answer_in_whole_characters_however_the_tokens_cut_it(tiny_base: Path) -> None:
    chat, draw = ChatFormat(load_tokenizer(tiny_base)), random.Random(3)
    pool = chat.tokenizer.encode("  日本語 €uro 🙂🙃 naïve\n\n x . , ", add_special_tokens=False)
    for _ in range(300):
        ids = [
            draw.choice(pool) if draw.random() < 0.6 else draw.randrange(len(chat.tokenizer))
            for _ in range(draw.randrange(1, 30))
        ]
        ids = [token for token in ids if token != chat.stop_id]
        transcript = Transcript(lambda part: str(chat.tokenizer.decode(part, skip_special_tokens=True)))
        assert "".join([*(transcript.add(token) for token in ids), transcript.end()]) == chat.decode_answer(
            ids
        )


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one two STOP three", ("STOP",), "one two"),
        ("a\n\nb", ("\n\n",), "a"),
        ("\n\nb", ("\n\n",), ""),
        ("S ST STO end", ("STOP",), "S ST STO end"),
        ("ab12", ("2", "1"), "ab"),
    ],
)
def test_no_part_of_a_stop_string_is_ever_sent(text: str, stops: tuple[str, ...], wanted: str) -> None:
    transcript, sent = Transcript(lambda ids: "".join(map(chr, ids)), stops), ""
    for token in map(ord, text):
        sent += transcript.add(token)
        assert wanted.startswith(sent)
        if transcript.stopped:
            break
    assert sent + transcript.end() == wanted and transcript.stopped == (wanted != text)
