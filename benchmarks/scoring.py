"""Measure how long likelihoods and greedy answers take on SmolLM2: `generate`, two passes, and one pass.

    python -m benchmarks.scoring [--rows 156] [--agree 0.6] [--rounds 2] [--json]

All arms score the same rows, documentation of the standard library, one batch of each arm after the other.
`usual`: a pass for the likelihood and `generate`, rows in the order of their file, padded to the longest of
a batch. `two`: the same two on rows of similar lengths. `one`: what the evaluation does. For the share
`agree` of rows the reference is what the model answers, as with a trained model; the others begin otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.train import make_examples, prepare_smollm2
from ratchet.models.chat_template import ChatFormat, Encoded

BATCH, LENGTH, ANSWER = 32, 256, 32


class Row(NamedTuple):
    prompt: list[int]
    whole: Encoded


Result = tuple[list[Any], list[list[int]]]  # likelihoods and answers of a batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=156)
    parser.add_argument("--agree", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare_smollm2(Path(folder), 1, LENGTH)
        found = measure(Path(folder) / "base", arguments.rows, arguments.agree, arguments.rounds)
    if arguments.json:
        print(json.dumps(found))
        return
    for arm, seconds in found["seconds"].items():
        print(f"{arm:6} {seconds:6.1f} s  {found['seconds']['usual'] / seconds:4.2f} of the usual's speed")
    print(f"{found['same']} of {arguments.rows} answers are the same in all arms")


def measure(base: Path, count: int, agree: float, rounds: int) -> dict[str, Any]:
    """Return each arm's seconds, and how many answers are the same in all of them."""
    import torch

    from ratchet.models.generation import answer_likelihoods, greedy_ids, likelihoods_and_answers
    from ratchet.models.loading import load_base, load_chat

    chat, model = load_chat(base), load_base(base).eval()
    rows = make_rows(chat, model, count, agree)

    def two(batch: Sequence[Row]) -> Result:
        settings: dict[str, Any] = {"batch_size": len(batch)}
        return (
            answer_likelihoods(model, [row.whole for row in batch], pad_id=chat.pad_id, **settings),
            greedy_ids(model, [row.prompt for row in batch], chat, max_new_tokens=ANSWER, **settings),
        )

    def one(batch: Sequence[Row]) -> Result:
        wholes, prompts = [row.whole for row in batch], [row.prompt for row in batch]
        return likelihoods_and_answers(model, wholes, prompts, chat, max_new_tokens=ANSWER)

    by_length = sorted(range(count), key=lambda index: len(rows[index].whole.ids))
    arms: dict[str, tuple[Callable[[Sequence[Row]], Result], list[int]]] = {
        "usual": (two, list(range(count))),
        "two": (two, by_length),
        "one": (one, by_length),
    }
    seconds = dict.fromkeys(arms, 0.0)
    said: dict[str, dict[int, list[int]]] = {arm: {} for arm in arms}
    with torch.inference_mode():
        for _ in range(rounds):
            for start in range(0, count, BATCH):
                for arm, (score, order) in arms.items():
                    places = order[start : start + BATCH]
                    began = time.perf_counter()
                    _, answers = score([rows[place] for place in places])
                    seconds[arm] += (time.perf_counter() - began) / rounds
                    said[arm] |= dict(zip(places, answers, strict=True))
    same = sum(len({tuple(said[arm][place]) for arm in arms}) == 1 for place in range(count))
    return {"rows": count, "agree": agree, "seconds": seconds, "same": same}


def make_rows(chat: ChatFormat, model: Any, count: int, agree: float) -> list[Row]:
    """Encode rows in random order, and let the model's own answer be the reference of some."""
    from ratchet.models.generation import greedy_ids

    examples = make_examples(4 * count)
    chance = random.Random(1)
    encoded = [(chat.encode_prompt(row.prompt), chat.encode(row)) for row in examples]
    rows = [Row(prompt, whole) for prompt, whole in encoded if len(whole.ids) <= LENGTH][:count]
    chance.shuffle(rows)
    few = rows[: round(agree * count)]
    prompts = [row.prompt for row in few]
    said = greedy_ids(model, prompts, chat, max_new_tokens=ANSWER, batch_size=BATCH)
    agreeing = [
        Row(prompt, Encoded([*prompt, *ids], [False] * len(prompt) + [True] * len(ids)))
        for prompt, ids in zip(prompts, said, strict=True)
    ]
    found = [*agreeing, *rows[len(few) :]]
    chance.shuffle(found)
    return found


if __name__ == "__main__":
    main()
