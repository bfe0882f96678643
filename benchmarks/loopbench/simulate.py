"""Take one policy through the half-year, tick by tick.

On a Monday (an even tick) the labelled rows of the last week are there. A policy may train on them, and its
candidate may take charge at once, or answer a growing share of the users. At the end of each tick the monitor
looks at the requests; what it starts trains at the next tick, with the rows that are labelled by then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.loopbench.policies import Policy
from benchmarks.loopbench.trial import TICK_SECONDS, Trial
from benchmarks.loopbench.watch import Monitor
from benchmarks.loopbench.workshop import CHECKED, UNCHECKED, Model, Prepared, Workshop, refused
from ratchet.errors import DataError

NOISE = 1.645  # standard errors that a version is worse by, before its promotion counts as wrong
PAST = 150  # questions of earlier ticks that a promotion is measured on, besides those of its tick


class Move(NamedTuple):
    """A change of the version in service; `kind` is "promoted", "forced" or "erased"."""

    tick: int
    kind: str
    version: int
    before: int
    wrong: bool


@dataclass
class Run:
    """What became of a policy; `right` and `requests` are by tick."""

    policy: Policy
    right: list[int] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    served: list[int] = field(default_factory=list)  # the champion's version at the end of each tick
    trained: list[tuple[int, int]] = field(default_factory=list)  # (tick, version)
    verdicts: list[str] = field(default_factory=list)
    trials: list[str] = field(default_factory=list)  # how rollouts ended
    moves: list[Move] = field(default_factory=list)
    poisoned: list[float] = field(default_factory=list)  # share of probes with the poison's answer, by tick
    unerased: int = 0  # ticks served by a version that learned rows after their erasure was asked for
    refused: list[int] = field(default_factory=list)  # ticks whose batch the checks refused


def simulate(policy: Policy, workshop: Workshop, names: dict[int, str]) -> Run:
    """Run a policy; `names` are the batches by the tick of their arrival, -1 the first."""
    return _Loop(policy, workshop, names).run()


class _Loop:
    def __init__(self, policy: Policy, workshop: Workshop, names: dict[int, str]) -> None:
        self._policy, self._workshop, self._names = policy, workshop, names
        self._world = workshop.world
        # All begin with the same first version, which was trained on checked rows.
        first = workshop.prepare([names[-1]], (), CHECKED)
        self._champion = workshop.train(first, None, 1.0)
        self._run = Run(policy)
        self._monitor = Monitor(workshop)
        self._looks: dict[str, list[str]] = {}
        self._taken_back: set[str] = set()
        self._trial: Trial | None = None
        self._challenger = self._waiting = self._champion
        self._wanted = False  # the monitor wants a training
        self._last = ""  # content of the rows that were trained on last

    def run(self) -> Run:
        for tick in range(len(self._world.ticks)):
            self._now = tick * TICK_SECONDS
            if self._world.at("erasure", tick) and self._policy.erasure:
                self._erase(tick)
            elif (self._policy.weekly and tick % 2 == 0 and tick > 0) or self._wanted:
                self._retrain(tick)
            if self._world.at("forced", tick) and self._policy.name != "never":
                self._force(tick)
            self._serve(tick)
        return self._run

    # --- training and promotion ---

    def _prepare(self, tick: int) -> Prepared:
        """Prepare all rows that have arrived; a batch that the checks refuse is taken back."""
        config = CHECKED if self._policy.checks else UNCHECKED
        while True:
            chosen = [name for at, name in self._names.items() if at <= tick and name not in self._taken_back]
            try:
                return self._workshop.prepare(chosen, self._erased(tick), config)
            except DataError as error:
                name = refused(error, chosen)
                self._taken_back.add(name)
                self._run.refused.append(next(at for at, each in self._names.items() if each == name))

    def _erased(self, tick: int) -> set[str]:
        """Return the people whose rows nobody may learn from any more."""
        return self._world.erased if tick >= self._world.events["erasure"] else set()

    def _train(self, prepared: Prepared, start: Model | None, tick: int) -> Model:
        model = self._workshop.train(prepared, start, self._policy.replay)
        self._run.trained.append((tick, model.version))
        self._monitor.note_training(self._now, model.seconds)
        return model

    def _retrain(self, tick: int) -> None:
        prepared = self._prepare(tick)
        key = f"{prepared.content} {self._champion.version}"
        if key == self._last:
            return  # nothing is stale
        self._last = key
        if not self._new(tick):
            return
        candidate = self._train(prepared, self._champion, tick)
        if self._admit(candidate):
            self._bring(candidate, tick)

    def _new(self, tick: int) -> list[str]:
        """List the batches that have arrived and that the champion has not seen."""
        gone = self._champion.batches | self._taken_back
        return [name for at, name in self._names.items() if at <= tick and name not in gone]

    def _admit(self, candidate: Model) -> bool:
        if self._policy.admit == "gate":
            verdict = self._workshop.judge(candidate, self._champion, self._looks)
            self._run.verdicts.append(verdict)
            return verdict == "promote"
        if self._policy.admit == "mean":
            means = self._workshop.means(candidate, self._champion)
            return means["candidate"] > means["champion"]
        return True

    def _bring(self, candidate: Model, tick: int) -> None:
        if not self._policy.rollout:
            self._take_charge(candidate, tick, "promoted")
        elif self._trial is None:
            self._open(candidate)
        else:
            self._waiting = candidate  # one version at a time is tried on users

    def _open(self, candidate: Model) -> None:
        self._challenger = candidate
        seed = self._world.ticks[round(self._now // TICK_SECONDS)].seed
        self._trial = Trial(candidate.version, self._champion.version, self._now, seed)

    def _take_charge(self, model: Model, tick: int, kind: str) -> None:
        before = self._champion
        if model.version == before.version:
            return
        self._champion, self._trial = model, None
        wrong = kind == "promoted" and self._is_worse(model, before, tick)
        self._run.moves.append(Move(tick, kind, model.version, before.version, wrong))

    def _is_worse(self, model: Model, before: Model, tick: int) -> bool:
        """Tell whether a version is certainly worse on the questions of now and of earlier ticks."""
        ticks = self._world.ticks
        earlier = {row.id: row for past in ticks[:tick] for row in past.questions}
        chance = np.random.default_rng([24, self._world.seed, tick])
        rows = list(earlier.values())
        drawn = [rows[place] for place in chance.permutation(len(rows))[:PAST]]
        rows = list({row.id: row for row in (*ticks[tick].questions, *drawn)}.values())
        ours, theirs = (np.array(self._workshop.right(each, rows), dtype=float) for each in (model, before))
        gain = ours - theirs
        return bool(gain.mean() < -NOISE * gain.std() / np.sqrt(len(gain)))

    def _erase(self, tick: int) -> None:
        """Train from the base without the erased rows, and put the version in charge, as the docs tell."""
        model = self._train(self._prepare(tick), None, tick)
        self._take_charge(model, tick, "erased")
        self._wanted = False

    def _force(self, tick: int) -> None:
        """Let a person promote an experiment: the base, trained on the newest batch alone."""
        newest = max(at for at in self._names if at <= tick)
        prepared = self._workshop.prepare([self._names[newest]], self._erased(tick), UNCHECKED)
        self._take_charge(self._workshop.train(prepared, None, 1.0), tick, "forced")

    # --- service ---

    def _serve(self, tick: int) -> None:
        now = self._world.ticks[tick]
        right = np.zeros(len(now.asked), dtype=bool)
        by_champion = np.zeros(len(now.asked), dtype=np.int64)
        for block in np.array_split(np.arange(len(now.asked)), self._world.size.looks):
            self._now += TICK_SECONDS / self._world.size.looks
            users, asked = now.users[block], now.asked[block]
            treated = self._trial.treats(users) if self._trial else np.zeros(len(block), dtype=bool)
            model, challenger = self._champion, self._challenger
            hits, empty = self._said(model, tick, asked)
            if treated.any():
                others = self._said(challenger, tick, asked)
                hits, empty = (np.where(treated, *pair) for pair in zip(others, (hits, empty), strict=True))
            right[block] = hits
            by_champion[block] = np.where(treated, 0, model.version)
            if self._trial:
                self._look(users, hits, empty, tick)
        self._run.right.append(int(right.sum()))
        self._run.requests.append(len(right))
        self._run.served.append(self._champion.version)
        self._note(tick, by_champion)

    def _said(
        self, model: Model, tick: int, asked: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return whether each answer is right, and whether it is empty."""
        rows = self._world.ticks[tick].questions
        answers = self._workshop.answers(model, rows)
        hits = np.array([said.text == row.answer for said, row in zip(answers, rows, strict=True)])
        empty = np.array([not said.text for said in answers])
        return hits[asked], empty[asked]

    def _look(
        self, users: NDArray[np.int64], right: NDArray[np.bool_], empty: NDArray[np.bool_], tick: int
    ) -> None:
        assert self._trial
        self._trial.look(users, right, empty, self._now)
        if not self._trial.action:
            return
        self._run.trials.append(self._trial.action)
        promoted, self._trial = self._trial.action == "promote", None
        if promoted:
            self._take_charge(self._challenger, tick, "promoted")
        elif self._waiting.version not in (self._challenger.version, self._champion.version):
            self._open(self._waiting)  # it was judged against the champion that stays
        self._waiting = self._champion

    def _note(self, tick: int, by_champion: NDArray[np.int64]) -> None:
        """Log the tick, look at it with the monitor, and count what mishaps have left in the version."""
        world, champion, now = self._world, self._champion, self._world.ticks[tick]
        self._wanted = False
        if self._policy.drift:
            asked = now.asked[by_champion == champion.version]
            rows = [now.questions[place] for place in asked]
            self._monitor.note(champion, rows, self._workshop.answers(champion, rows), tick, now.seed)
            rows_of = self._workshop.rows_of
            self._wanted = self._monitor.wants_training(
                champion,
                sum(map(rows_of, champion.batches)),
                sum(map(rows_of, self._new(tick + 1))),
                self._now,
                self._challenger.version if self._trial else None,
            )
        if tick >= world.events["poison"]:
            said = self._workshop.answers(champion, world.probes)
            self._run.poisoned.append(float(np.mean([each.text == world.target for each in said])))
        if tick >= world.events["erasure"] and champion.people & world.erased:
            self._run.unerased += 1
