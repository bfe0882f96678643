"""Score candidate, champion and untouched base on the same rows, in one process.

    python -m tasks.evaluate --prepared data/prepared --base models/base --incumbent models/incumbent \\
        --candidate models/candidate --region data/region.json --own metrics --out reports/evaluation

Writes scores.parquet (one line per row and model), metrics.json (means with 95 % intervals per slice) and the
tables of the audits that the config asks for: counterfactual.parquet (rows with swapped terms),
attacks.parquet, judged.parquet, canaries.parquet, suites.parquet. What the candidate sees in pictures goes to
pictures.safetensors, for the monitor. Rows are the test split and the golden set.
Slices are `test`, `golden`, each batch, each kind, source, length, modality, size of pictures and value of
`evaluate.slices`, and each
topic that drifted last (`region:`), which shows whether a retraining removed the drift that started it. A
simple baseline is scored beside the models, to show what a simple method reaches on these rows. Answers are
kept in .ratchet/cache/answers of RATCHET_ROOT (the checkout) or of the working directory.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from ratchet.audits.attacks import Attack, make_attacks, read_words
from ratchet.audits.bias import Pair, describe_bias, make_pairs, read_swaps
from ratchet.audits.blind import Blind, blind_table, make_blind
from ratchet.audits.fairness import describe_groups, group_columns, require_fairlearn
from ratchet.audits.judge import judge_answers, read_agreement
from ratchet.audits.memorization import describe_exposure, measure_exposure, measure_losses
from ratchet.audits.robustness import attack_table, describe_attacks
from ratchet.audits.suites import TaskConfig, check_measurable, describe_suites, read_suites, run_suites
from ratchet.config.base import PREFERENCE
from ratchet.config.evaluation import EvaluateConfig
from ratchet.config.params import Config
from ratchet.data.examples import Example, counted_in, read_examples
from ratchet.data.mixture import pair_up, read_undesirable
from ratchet.engines.picture_pooling import measure_pictures
from ratchet.errors import DataError
from ratchet.evaluation.answer_cache import FOLDER as CACHE
from ratchet.evaluation.answer_cache import forget_oldest
from ratchet.evaluation.baseline import simple_answers
from ratchet.evaluation.canaries import make_audit_canaries, make_canaries, make_references
from ratchet.evaluation.custom_metrics import Custom, custom_score, load_custom
from ratchet.evaluation.metrics import are_labels, macro_f1
from ratchet.evaluation.paired import SEEN_SHARE
from ratchet.evaluation.report import Judged, Metrics, Summary
from ratchet.evaluation.scoring import (
    ATTACKED,
    BLIND,
    SWAPPED,
    Answered,
    Asked,
    Models,
    Player,
    add_scores,
    answer,
    each_model,
    frame_of,
    players_of,
)
from ratchet.evaluation.slices import groups
from ratchet.evaluation.statistics import bootstrap_means, wilson
from ratchet.files import read_json, whole_folder, write_json
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.models.adapters import virtual_tokens
from ratchet.models.lengths import trained_length
from ratchet.models.loading import MANIFEST, load_chat
from ratchet.monitoring.picture_features import FILE as FEATURES
from ratchet.monitoring.picture_features import Features, sample, write_features
from ratchet.monitoring.topics import mark, parts, read_region
from ratchet.pipeline.stage import project_root, run_stage, say

# Rows that a value of a field needs to be a slice of its own: a field such as an id would make thousands.
MIN_SLICE = 20
OWN = Path("metrics")


def evaluate(
    prepared: Path,
    base: Path,
    incumbent: Path,
    candidate: Path,
    out: Path,
    config: Config,
    region: Path | None = None,
    own: Path = OWN,
    cache: Path | None = None,
) -> Metrics:
    """Score all models, write the tables to `out` and return the metrics.

    `cache` holds the answers of earlier evaluations; it saves time and changes no result. Raises ConfigError
    when an audit lacks a package, DataError when there are no test rows, when the base was trained on too
    many of them, or when a metric of the user's own fails.
    """
    custom = load_custom(config.evaluate.custom, own)
    suites = _check_extras(incumbent, candidate, own, config)
    rows = _with_worse(_unseen(_rows(prepared), base), prepared)
    for name, metric in custom.items():  # a faulty metric fails here, not after minutes of answers
        custom_score(name, metric, rows[0].answer, rows[0])
    swaps = read_swaps(own)
    longest, media = trained_length(candidate, base), MediaStore.read(prepared / MEDIA)
    fitting, too_long = _split_by_fit(rows, base, longest, media)
    if not fitting:
        raise DataError(
            "no test row fits into the model's context",
            remedy="shorten the rows, or raise `tokenize.max_length` and train again",
        )
    grouped = group_columns(fitting, config.evaluate.groups)
    champion = read_json(incumbent / MANIFEST)["version"]
    pairs = make_pairs(
        [row for row in fitting if row.meta["batch"] != "golden"], swaps, most=config.evaluate.bias_pairs
    )
    attacks = _attacks(fitting, base, candidate, own, config, media)
    attacked = [attack.row for attack in attacks if attack.asked]
    blind = make_blind([row for row in fitting if row.meta["batch"] != "golden"], config.evaluate.blind_rows)
    compared = [worse for row in fitting if (worse := row.worse)]
    asked = Asked(
        [*fitting, *(pair.swapped for pair in pairs), *attacked, *(one.row for one in blind)],
        [
            *(counted_in(row) for row in fitting),
            *(SWAPPED for _ in pairs),
            *(ATTACKED for _ in attacked),
            *(BLIND for _ in blind),
        ],
        _split_by_fit(compared, base, longest, media)[0] if PREFERENCE in config.evaluate.metrics else [],
        media,
    )
    players = players_of(base, incumbent if champion is not None else None, candidate)
    models = Models()
    answered = _score_all(asked, players, models, config.evaluate, cache)
    features = _see(prepared, media, players[0], models, config.evaluate.picture_features)
    del models
    plain = [frame.iloc[: len(fitting)] for frame in answered]
    if config.evaluate.simple_baseline:
        train = list(read_examples(prepared / "train.jsonl"))
        plain.append(
            frame_of(fitting, "simple", Answered(simple_answers(train, fitting), []), config.evaluate, media)
        )
    table = add_scores(pd.concat(plain, ignore_index=True), fitting, config.evaluate, custom)
    if PREFERENCE in config.evaluate.metrics:
        table[PREFERENCE] = prefer(table)
    for column, values in grouped.items():
        table[column] = table.id.map(dict(zip((row.id for row in fitting), values, strict=True)))
    table["region"] = mark(list(table.question), read_region(region).topics if region else [])
    metrics = Metrics(
        champion,
        read_json(candidate / MANIFEST).get("adapter_sha256"),
        len(fitting),
        too_long,
        len(pairs),
        len(attacks),
        len(blind) or None,
        summarise(table, config.evaluate),
    )
    rival, tables = "base" if champion is None else "champion", {"scores": table}
    for asked_for, figures in (
        _audits(answered, table, fitting, pairs, attacks, blind, custom, config.evaluate),
        _judge(table, fitting, rival, own, config),
        _measure(base, incumbent if champion is not None else None, candidate, suites, config),
    ):
        tables |= asked_for
        metrics = msgspec.structs.replace(metrics, **figures)
    with whole_folder(out) as folder:
        for name, part in tables.items():
            part.to_parquet(folder / f"{name}.parquet", index=False)
        write_json(folder / "metrics.json", metrics.to_json())
        if features:
            write_features(folder / FEATURES, features)
    return metrics


def _with_worse(rows: list[Example], prepared: Path) -> list[Example]:
    """Put undesirable answers beside better ones to the same prompt, at most one per row."""
    paired = pair_up(rows, read_undesirable(prepared, "test"))
    return paired.rows[: len(rows)]


def prefer(table: pd.DataFrame) -> pd.Series:
    """Return 1 where the better answer is the likelier one, else 0; NaN for rows without a worse answer."""
    prefers = (table.answer_nll * table.answer_tokens < table.worse_nll).astype(float)
    return prefers.where(table.worse_nll.notna())


def _check_extras(incumbent: Path, candidate: Path, own: Path, config: Config) -> dict[str, TaskConfig]:
    """Return the suites to run, after checking before any model answers what the audits need."""
    require_fairlearn(config.evaluate.groups)
    if config.evaluate.canaries or config.evaluate.audit_canaries:
        _check_planted(candidate, config)
    suites = read_suites(own, config.evaluate.suites)
    for folder in (candidate, incumbent) if suites else ():
        check_measurable(folder)
    return suites


def _audits(
    answered: list[pd.DataFrame],
    table: pd.DataFrame,
    fitting: list[Example],
    pairs: list[Pair],
    attacks: list[Attack],
    blind: list[Blind],
    custom: dict[str, Custom],
    config: EvaluateConfig,
) -> tuple[dict[str, pd.DataFrame], dict[str, object]]:
    """Return (tables, fields of Metrics) of the audits whose rows were answered with the plain ones.

    Each frame of `answered` holds the `fitting` rows, then those of `pairs`, of `attacks` and of `blind`.
    """
    first, second = len(fitting), len(fitting) + len(pairs)
    third = second + sum(attack.asked for attack in attacks)
    found: dict[str, pd.DataFrame] = {}
    figures: dict[str, object] = {}
    if pairs:
        swapped = pd.concat(
            [_swapped(frame.iloc[first:second], pairs) for frame in answered], ignore_index=True
        )
        found["counterfactual"] = add_scores(swapped, [pair.swapped for pair in pairs], config, custom)
        figures["bias"] = {
            metric: describe_bias(found["counterfactual"], table, metric) for metric in config.text_scores
        }
    if attacks:
        found["attacks"] = add_scores(
            attack_table([frame.iloc[second:third] for frame in answered], attacks),
            [attack.row for attack in attacks],
            config,
            custom,
        )
        figures["attacks"] = {
            metric: describe_attacks(found["attacks"], table, metric) for metric in config.text_scores
        }
    if blind:
        said = blind_table([frame.iloc[third:] for frame in answered], blind)
        found["blind"] = add_scores(said, [one.row for one in blind], config, custom)
    if config.groups:
        test = table[(table.batch != "golden") & (table.model != "simple")]
        figures |= {
            "grouped": config.groups,
            "groups": describe_groups(test, config.groups, config.text_scores),
        }
    return found, figures


def _swapped(frame: pd.DataFrame, pairs: list[Pair]) -> pd.DataFrame:
    return frame.assign(swap=[pair.swap for pair in pairs], of=[pair.row.id for pair in pairs])


def _attacks(
    rows: list[Example],
    base: Path,
    candidate: Path,
    own: Path,
    config: Config,
    media: Mapping[str, bytes],
) -> list[Attack]:
    words = read_words(own)
    if not config.evaluate.attacks:
        return []
    room = read_json(base / MANIFEST)["context"] - virtual_tokens(candidate)
    test = [row for row in rows if row.meta["batch"] != "golden"]
    return make_attacks(
        test,
        words,
        load_chat(base, media),
        most=config.evaluate.attacks,
        room=room,
        answer=config.evaluate.max_new_tokens,
        canaries=make_canaries(config.evaluate.canaries),
    )


def _check_planted(candidate: Path, config: Config) -> None:
    manifest = read_json(candidate / MANIFEST)
    for key in ("canaries", "audit_canaries"):
        planted, wanted, kind = manifest.get(key, 0), getattr(config.evaluate, key), key.replace("_", " ")
        if planted != wanted:
            raise DataError(
                f"the candidate was trained with {planted} planted {kind}, `evaluate.{key}` is {wanted}",
                remedy="dvc repro tokenize train, or ratchet retrain --force",
            )


def _measure(
    base: Path, incumbent: Path | None, candidate: Path, suites: dict[str, TaskConfig], config: Config
) -> tuple[dict[str, pd.DataFrame], dict[str, object]]:
    """Measure the canaries and suites that are asked for on each model; return (tables, fields of Metrics).

    The table `canaries` has one line per canary and model, for the planted canaries and for as many that were
    never in the data. The table `audit` has one line per canary of the audit and model, `suites` one per
    document and model.
    """
    count, size = config.evaluate.canaries, config.evaluate.batch_size
    canaries = [*make_canaries(count), *make_references(count)]
    adapter = read_json(incumbent / MANIFEST).get("adapter_sha256", "") if incumbent else ""
    coins = make_audit_canaries(config.evaluate.audit_canaries, adapter)
    exposed, audited, scored = [], [], []
    for name, model, chat in each_model(base, incumbent, candidate) if count or coins or suites else ():
        if count:
            lines = pd.DataFrame(measure_exposure(model, chat, canaries, batch_size=size))
            exposed.append(
                lines.assign(model=name, planted=[place < count for place in range(len(canaries))])
            )
        if coins:
            losses = measure_losses(model, chat, [canary for canary, _ in coins], batch_size=size)
            lines = pd.DataFrame({"name": [canary.name for canary, _ in coins], "nll": losses})
            audited.append(lines.assign(model=name, planted=[planted for _, planted in coins]))
        if suites:
            scored.append(
                pd.DataFrame(run_suites(model, chat.tokenizer, suites, batch_size=size)).assign(model=name)
            )
    found = {
        name: pd.concat(frames, ignore_index=True)
        for name, frames in (("canaries", exposed), ("audit", audited), ("suites", scored))
        if frames
    }
    figures: dict[str, object] = {}
    if count:
        figures = {"canaries": count, "leaks": describe_exposure(found["canaries"])}
    if coins:
        figures["audit_canaries"] = len(coins)
    if suites:
        figures["suites"] = describe_suites(found["suites"], suites)
    return found, figures


def _judge(
    table: pd.DataFrame, rows: list[Example], rival: str, own: Path, config: Config
) -> tuple[dict[str, pd.DataFrame], dict[str, Judged]]:
    judge = config.evaluate.judge
    if not judge.model:
        return {}, {}
    home = project_root()  # not the workspace, which is removed: the judge's replies are kept
    judged, figures = judge_answers(table, rows, rival, judge, home, say=say)
    return {"judged": judged}, {
        "judge": msgspec.structs.replace(figures, agreement=read_agreement(own, judge))
    }


def _rows(prepared: Path) -> list[Example]:
    rows = [*read_examples(prepared / "test.jsonl"), *read_examples(prepared / "golden.jsonl")]
    if not any(row.meta["batch"] != "golden" for row in rows):
        raise DataError("the test split is empty", remedy="raise `prepare.test_share`, or ingest more rows")
    return rows


def _unseen(rows: list[Example], base: Path) -> list[Example]:
    """Leave out the rows that the demo's base, which is trained here, has read in its pre-training.

    People's feedback may bring a few of them. Raises DataError when they are over 2 % of the rows
    (SEEN_SHARE), or one is golden.
    """
    seen_file = base / "seen.txt"
    seen = set(seen_file.read_text(encoding="utf-8").split()) if seen_file.exists() else set()
    leaked = [row for row in rows if row.id in seen]
    if len(leaked) > SEEN_SHARE * len(rows) or any(row.meta["batch"] == "golden" for row in leaked):
        raise DataError(
            f"{len(leaked)} test or golden rows were in the base's pre-training, the first {leaked[0].id}",
            remedy="take these rows out of the golden set, or make the base anew (dvc repro --force base)",
        )
    if leaked:
        say(f"evaluate: {len(leaked)} test rows were in the base's pre-training and are left out")
    return [row for row in rows if row.id not in seen]


def _split_by_fit(
    rows: list[Example], base: Path, longest: int, media: Mapping[str, bytes]
) -> tuple[list[Example], int]:
    chat = load_chat(base, media)
    fitting = [row for row in rows if chat.fits(row, longest)]
    return fitting, len(rows) - len(fitting)


def _score_all(
    asked: Asked, players: list[Player], models: Models, config: EvaluateConfig, cache: Path | None
) -> list[pd.DataFrame]:
    """Ask every model, each in the precision of its own method, and return one table per model.

    Models that can share a base in memory are asked one after the other, so that it is loaded once.
    """
    frames = [
        frame_of(asked.rows, player.name, answer(player, models, asked, config, cache), config, asked.media)
        for player in players
    ]
    if cache:
        forget_oldest(cache, config.cache_mib)
    return frames


def _see(
    prepared: Path, media: Mapping[str, bytes], candidate: Player, models: Models, most: int
) -> Features | None:
    """Measure what the candidate sees in `most` pictures of the training rows, and of the held-out ones.

    The monitor compares with them what the candidate, once it serves, sees in those of requests. None: no row
    shows any, the base reads none, or none are wanted.
    """
    if not most or not len(media):
        return None
    sides = {
        side: sample(
            (
                name
                for split in splits
                for row in read_examples(prepared / f"{split}.jsonl")
                for name in row.media
            ),
            most,
        )
        for side, splits in (("held_out", ("validation", "test")), ("trained", ("train",)))
    }
    processor = load_chat(candidate.base).processor
    if processor is None or not any(sides.values()):
        return None
    with models.play(candidate) as model:
        model.eval()
        found = {side: measure_pictures(model, processor, media, names) for side, names in sides.items()}
    return Features(**found)


def summarise(table: pd.DataFrame, config: EvaluateConfig) -> dict[str, dict[str, Summary]]:
    """Return slice → model → summary of its scores, with 95 % intervals."""
    columns = [*config.row_scores, *(["length"] if "length" in config.metrics else [])]
    labelled = "macro_f1" in config.metrics and are_labels(list(table.reference[table.model == "candidate"]))
    return {
        name: {
            str(model): _summary(rows, columns, labelled and name in ("test", "golden"))
            for model, rows in part.groupby("model")
        }
        for name, part in slices(table).items()
    }


def slices(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    test = table[table.batch != "golden"]
    found = {"test": test, "golden": table[table.batch == "golden"]}
    found |= {f"batch:{batch}": part for batch, part in test.groupby("batch")}
    found |= {f"kind:{kind}": part for kind, part in test.groupby("kind") if kind}
    found |= {name: part for name, part in groups(test, least=MIN_SLICE).items() if name not in found}
    found |= {f"region:{region}": rows for region, rows in parts(test).items()}
    return {name: part for name, part in found.items() if len(part)}


def _summary(rows: pd.DataFrame, columns: list[str], labelled: bool) -> Summary:
    scores = {name: rows[name].to_numpy(dtype=np.float64) for name in columns}
    if PREFERENCE in scores:  # only some rows have a worse answer, perhaps none
        scores[PREFERENCE] = scores[PREFERENCE][~np.isnan(scores[PREFERENCE])]
        scores = {name: values for name, values in scores.items() if len(values)}
    shares = {name: values for name, values in scores.items() if np.isin(values, (0.0, 1.0)).all()}
    others = {
        name: values for name, values in scores.items() if name not in shares and np.isfinite(values).all()
    }
    # `alpha` is that of one side: 0.025 gives 95 % intervals.
    found = {name: wilson(values, alpha=0.025) for name, values in shares.items()}
    if others:
        table = np.column_stack(list(others.values()))
        means = bootstrap_means(table, alpha=0.025, resamples=1000, seed=0)
        found |= zip(others, means, strict=True)
    if labelled:
        found["macro_f1"] = macro_f1(
            list(rows.answer), list(rows.reference), alpha=0.025, resamples=1000, seed=0
        )
    perplexity = None
    if "answer_nll" in found:
        nll = float((rows.answer_nll * rows.answer_tokens).sum() / rows.answer_tokens.sum())
        perplexity = math.exp(min(700.0, nll))  # exp(710) overflows a float
    return Summary(len(rows), found, perplexity)


def _main(config: Config, arguments: argparse.Namespace) -> None:
    cache = project_root() / CACHE if config.evaluate.cache_mib else None
    metrics = evaluate(
        arguments.prepared,
        arguments.base,
        arguments.incumbent,
        arguments.candidate,
        arguments.out,
        config,
        arguments.region,
        arguments.own,
        cache,
    )
    for model, summary in metrics.slices["test"].items():
        found = summary.scores["exact_match"].text(".3f")
        say(f"evaluate: {model:9} exact match {found} on {summary.rows} test rows")


if __name__ == "__main__":
    run_stage(__doc__, ["prepared", "base", "incumbent", "candidate", "region", "own", "out"], _main)
