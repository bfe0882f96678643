"""People's names in texts, by Presidio on a spaCy model that the team has installed: the extra `names`.

    pip install 'ratchet[names]' && python -m spacy download en_core_web_sm

Names have no form to go by, so a model guesses: expect some that are none (products, places) and some that are missed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ratchet.errors import ConfigError

ENTITY, LEAST_SCORE = "PERSON", 0.5


def mask_names(text: str, model: str, by: str) -> str:
    """`by` in place of each name. Raises ConfigError: the extra or the model is not installed."""
    found = sorted(_analyzer(model).analyze(text, language="en", entities=[ENTITY], score_threshold=LEAST_SCORE), key=lambda one: one.start, reverse=True)
    for one in found:
        text = text[: one.start] + by + text[one.end :]
    return text


@cache
def _analyzer(model: str) -> Any:
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    except ModuleNotFoundError as error:
        raise ConfigError(f"prepare.names_model is {model!r}, and {error.name} is not installed", remedy="pip install 'ratchet[names]', or leave the key empty") from None
    try:
        loaded = spacy.load(model)
    except OSError:
        raise ConfigError(f"prepare.names_model is {model!r}, and spaCy knows no such model", remedy=f"python -m spacy download {model}, or name a folder that holds one") from None
    engine = SpacyNlpEngine(ner_model_configuration=NerModelConfiguration())
    engine.nlp = {"en": loaded}  # Presidio's own way in would fetch a model that is missing
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
