"""The monitor at the end of a tick: the newest requests against the rows of the champion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.loopbench.trial import SPOKEN, TICK_SECONDS
from benchmarks.loopbench.workshop import Answer, Model, Workshop, settings
from ratchet.data.examples import Example
from ratchet.monitoring.request_records import Feedback, Logged
from tasks.monitor import Facts, decide, measure

EARLIER = 2000  # requests of the same champion that are kept to compare with
WEEK = 2 * TICK_SECONDS


class Monitor:
    """The monitor of one policy: the champion's log, and the trainings of the last days."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self._config = settings(workshop.world, "champion", 0.0)
        self._champion = 0
        self._log: list[Logged] = []
        self._feedback: dict[str, list[Feedback]] = {}
        self._trained: list[tuple[float, float]] = []  # when, and for how many seconds

    def note_training(self, now: float, seconds: float) -> None:
        self._trained.append((now, seconds))

    def note(
        self, champion: Model, rows: Sequence[Example], answers: Sequence[Answer], tick: int, seed: int
    ) -> None:
        """Log the requests of a tick that the champion answered."""
        if champion.version != self._champion:
            self._champion, self._log, self._feedback = champion.version, [], {}
        chance = np.random.default_rng([23, seed])
        latency, spoken = chance.lognormal(4, 0.5, len(rows)), chance.random(len(rows)) < SPOKEN
        for place, (row, said) in enumerate(zip(rows, answers, strict=True)):
            name = f"{tick}-{place}"
            request = Logged(
                *(name, tick * TICK_SECONDS + place, "", "champion", champion.version),
                messages=(("user", row.question),),
                answer=said.text,
                latency_ms=float(latency[place]),
                prompt_nll=said.prompt_nll,
            )
            self._log.append(request)
            if spoken[place]:
                score = float(said.text == row.answer)
                self._feedback[name] = [Feedback(name, "", 0.0, score)]

    def wants_training(
        self, champion: Model, known_rows: int, new_rows: int, now: float, rollout: int | None
    ) -> bool:
        """Look at the window, and decide as the flow `monitor` does."""
        window = self._config.monitor.window
        newest = self._log[-window:]
        earlier = self._log[:-window][-EARLIER:]
        key = (champion.version, *(f"{one.id} {one.answer}" for one in (*newest, *earlier)))
        drifts = self._workshop.drifts
        if key not in drifts:
            reference = self._workshop.reference(champion)
            drifts[key] = measure(newest, self._feedback, earlier, reference, self._config)
        verdict = drifts[key]
        week = [(at, seconds) for at, seconds in self._trained if now - at < WEEK]
        facts = Facts(
            new_rows,
            len(week),
            sum(seconds for _, seconds in week) / 3600,
            (now - self._trained[-1][0]) / 3600 if self._trained else None,
            rollout_of=rollout,
            known_rows=known_rows,
        )
        return decide(verdict, facts, self._config).retrain
