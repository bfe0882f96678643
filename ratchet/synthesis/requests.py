"""Make requests to the teacher, one for each chunk, set of examples or question, and read the answers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import xxhash

from ratchet.data.examples import MEDIA_MARK, Example, Meta
from ratchet.llm.prompts import Prompt, Template
from ratchet.llm.replies import Pair, Pairs, Questions, read_reply
from ratchet.media.pictures import shrink
from ratchet.synthesis.documents import Chunk

SIDE = 1024  # pixels of the longer side of a picture that a teacher is shown
EXAMPLES = 5  # rows that one self-instruct prompt (arXiv 2212.10560) shows
MOST_ASKED = 40  # most questions of earlier rounds that a prompt lists


class Ask(NamedTuple):
    """One request; `about` is the id of the chunk, the examples or the row that it is about.

    `answer` is the known answer, which each new question keeps; `parent` and `question` are id and question
    of the row to reword.
    """

    about: str
    prompt: Prompt
    shape: type[Pairs] | type[Questions]
    meta: Meta
    passage: str = ""
    answer: str = ""
    parent: str = ""
    question: str = ""
    system: str | None = None
    media: tuple[str, ...] = ()  # names of the pictures that the prompt, and so each new row, shows

    def read(self, raw: str) -> list[Pair]:
        """Return the pairs in an answer. Raises Malformed unless `Teacher.ask` has accepted the answer."""
        if self.shape is Questions:
            return [Pair(question, self.answer) for question in read_reply(raw, Questions).questions]
        return list(read_reply(raw, Pairs).pairs)


class Subject(NamedTuple):
    """A question to reword; without an `answer` the teacher writes one."""

    id: str
    question: str
    answer: str = ""
    why: str = ""
    system: str | None = None
    media: tuple[str, ...] = ()


def ask_of_chunks(
    chunks: Iterable[Chunk], template: Template, *, per_chunk: int, asked: dict[str, list[str]]
) -> Iterator[Ask]:
    """Yield a request for each chunk; `asked` maps a chunk's id to the questions of earlier rounds."""
    for chunk in chunks:
        prompt = template.render(
            document=chunk.document,
            passage=chunk.text,
            count=per_chunk,
            asked=asked.get(chunk.id, [])[-MOST_ASKED:],
        )
        yield Ask(
            chunk.id, prompt, Pairs, {"document": chunk.document, "chunk": chunk.id}, passage=chunk.text
        )


class Shown(NamedTuple):
    """How rows with pictures are asked about: the template, and the pictures by name."""

    template: Template
    pictures: Mapping[str, bytes]

    def show(self, prompt: Prompt, names: Sequence[str]) -> Prompt:
        return prompt.showing(tuple(shrink(self.pictures[name], SIDE) for name in names))


def ask_of_seeds(
    rows: Sequence[Example], template: Template, shown_as: Shown, *, per_chunk: int, requests: int, seed: int
) -> Iterator[Ask]:
    """Yield `requests` requests, each with its own random sample of `rows` as examples.

    A row with pictures is the only example of its request, which shows them.
    """
    draw = random.Random(seed)  # noqa: S311 (no secret)
    seen, rows = [row for row in rows if row.media], [row for row in rows if not row.media]
    deck: list[Example] = []
    for _ in range(requests):
        if seen and draw.random() * (len(seen) + len(rows)) < len(seen):
            deck = deck or draw.sample(seen, len(seen))  # no picture twice before all were shown
            yield _ask_of_picture(deck.pop(), shown_as, per_chunk)
            continue
        shown = draw.sample(rows, min(EXAMPLES, len(rows)))
        about = xxhash.xxh3_128_hexdigest("".join(row.id for row in shown).encode())
        prompt = template.render(
            examples=[{"question": row.question, "answer": row.answer} for row in shown], count=per_chunk
        )
        system = shown[0].messages[0].content if shown[0].messages[0].role == "system" else None
        yield Ask(about, prompt, Pairs, {"seeds": " ".join(row.id[:12] for row in shown)}, system=system)


def _ask_of_picture(row: Example, shown_as: Shown, per_chunk: int) -> Ask:
    question = row.question.replace(MEDIA_MARK, "").strip()
    prompt = shown_as.template.render(question=question, answer=row.answer, count=per_chunk)
    system = row.messages[0].content if row.messages[0].role == "system" else None
    return Ask(
        row.id,
        shown_as.show(prompt, row.media),
        Pairs,
        {"seeds": row.id[:12]},
        system=system,
        media=row.media,
    )


def ask_of_subjects(
    subjects: Iterable[Subject], template: Template, shown_as: Shown, *, per_chunk: int
) -> Iterator[Ask]:
    for subject in subjects:
        prompt = template.render(question=subject.question, answer=subject.answer, count=per_chunk)
        if subject.media:
            prompt = shown_as.show(prompt, subject.media)
        meta: Meta = {"paraphrase_of": subject.id, "chosen_for": subject.why}
        parent = subject.id if subject.answer else ""
        yield Ask(
            subject.id,
            prompt,
            Questions if subject.answer else Pairs,
            meta,
            answer=subject.answer,
            parent=parent,
            question=subject.question,
            system=subject.system,
            media=subject.media,
        )
