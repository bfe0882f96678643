"""Find, name and mask secrets and personal data in texts; the values themselves are never passed on.

Secrets are found by detect-secrets' plugins and by a few prefixes that these do not know; personal data by
regular expressions and the checksums of the numbers (Luhn for cards, ISO 13616's modulo 97 for IBANs); names
of people by Presidio, where a spaCy model is configured. Not covered: names of places.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from ratchet.errors import ConfigError

MASK = "[{}]"  # an e-mail address becomes [email]
# Every secret has a long token, a password in a URL, or the header of a private key. Most texts have none of
# these, so that the slow plugins need not run.
SUSPECT = re.compile(r"[A-Za-z0-9_+/=-]{20}|://[^\s@]{1,300}@|PRIVATE KEY|PuTTY-User-Key", re.ASCII)
PREFIXES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}"
    r"|sk-(?:proj-|ant-|or-)?(?=[A-Za-z_-]{0,60}\d)(?=[a-z0-9_-]{0,60}[A-Z])[A-Za-z0-9_-]{20,}"
    r"|github_pat_\w{20,}|AIza[\w-]{35}|npm_[A-Za-z0-9]{36}|xox[a-z]-[A-Za-z0-9-]{10,})",
    re.ASCII,
)
PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,20}-----.*?"
    r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,20}-----|\Z)",
    re.DOTALL,
)
RANDOM = re.compile(r"(?<![A-Za-z0-9_+/=.-])[A-Za-z0-9_+/=-]{32,200}(?![A-Za-z0-9_+/=-])", re.ASCII)
# What stands before a secret without a known prefix; hashes, ids and public keys are random as well.
NAMED = re.compile(
    r"(?:key|token|secret|passw(?:or)?d|pwd|credential|auth)\w{0,20}\W[^\n]{0,40}$", re.IGNORECASE
)
LOGIN = re.compile(r"(://[^\s:/@]{0,100}:)([^\s@]{1,200})(?=@)")
PLACEHOLDERS = frozenset(  # passwords in example URLs, which are no secrets
    [
        "pass",
        "passwd",
        "password",
        "pwd",
        "secret",
        "port",
        "pw",
        "xxx",
        "xxxx",
        "user",
        "username",
        "hunter2",
        "changeme",
        "example",
        "test",
    ]
)
# `password=…`, `"api_key": "…"` and the like; what is assigned is judged by `_is_chosen`.
ASSIGNED = re.compile(
    r"(?<![A-Za-z])((?:passw(?:or)?d|passphrase|pwd|secret|api[_-]?key"
    r"|(?:access|auth|private|secret|signing)[_-]?(?:key|token))[\"'`]?[ \t]{0,3}(?::=|=>|=|:)[ \t]{0,3}"
    r"(?P<quote>[\"'`]?))(?P<value>[^\s\"'`,;<>(){}\[\]]{8,200})(?![(\[{<\w])",
    re.IGNORECASE,
)
DUMMY = re.compile(
    r"example|change.?me|your|x{4}|\*{3}|\.{3}|placeholder|dummy|redacted|masked|hidden", re.IGNORECASE
)
REFERENCE = re.compile(r"[$%@/~.]|https?:|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+$|(?:env|vault|arn|sha\d+|file):")
PIECE, OVERLAP = 4000, 500  # characters; pieces, because some plugins' expressions take quadratic time
SHORTEST = 8  # characters; a shorter match of a plugin is not replaced everywhere in the text
RANDOM_BITS = 4.4  # of entropy a character, at least: hexadecimal has at most 4, words in CamelCase about 4
PLUGINS = (
    ("aws", "AWSKeyDetector"),
    ("azure_storage_key", "AzureStorageKeyDetector"),
    ("github_token", "GitHubTokenDetector"),
    ("gitlab_token", "GitLabTokenDetector"),
    ("jwt", "JwtTokenDetector"),
    ("npm", "NpmDetector"),
    ("openai", "OpenAIDetector"),
    ("private_key", "PrivateKeyDetector"),
    ("pypi_token", "PypiTokenDetector"),
    ("sendgrid", "SendGridDetector"),
    ("slack", "SlackDetector"),
    ("stripe", "StripeDetector"),
)
EMAIL = re.compile(
    r"(?<![\w.+-])(?!git@)[\w.+-]{1,64}+@[\w-]{1,63}(?:\.[\w-]{1,63})*"
    r"\.(?!(?:png|jpe?g|gif|svg|webp)\b)[^\W\d_]{2,63}(?![\w-]*[(\[])"
)
PHONE = re.compile(
    r"(?<![\w.+-])(?:\+(?!\d{4}-\d\d)[1-9]\d{0,2}(?:[ ./-]?\(\d{1,4}\))?(?:[ ./-]?\d{2,4}){2,6}"
    r"|\(\d{3}\) ?\d{3}[-. ]\d{4}|\d{3}-\d{3}-\d{4})(?![\w-])"
)
CARD = re.compile(
    "(?<![\\w.-])(?:[2-6]\\d{12,18}|[2-6]\\d{3}([ \u00a0-])\\d{4}\\1\\d{4}\\1\\d{1,7}"
    "|3\\d{3}([ \u00a0-])\\d{6}\\2\\d{5})(?![\\w-]|\\.\\d)"
)
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?![A-Z0-9])")
NATIONAL = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
NUMBERS = re.compile(r"\d(?:[ ()./+-]{0,2}\d){6}|[A-Z]{2}\d\d")
ENTITY, LEAST_SCORE = "PERSON", 0.5


# --- secrets ------------------------------------------------------------------------------------------------


def find_secret(text: str) -> str | None:
    """Return the kind of the first secret found in the text, or None."""
    if any(_is_chosen(match) for match in ASSIGNED.finditer(text)):
        return "password or key that is assigned"
    if not SUSPECT.search(text):
        return None
    if PREFIXES.search(text):
        return "API key"
    if any(_is_password(match.group(2)) for match in LOGIN.finditer(text)):
        return "password in a URL"
    for plugin in _plugins():
        if any(_found_by(plugin, text)):
            return str(plugin.secret_type)
    return "random string" if any(_is_random(match) for match in RANDOM.finditer(text)) else None


def redact(text: str, by: str) -> str:
    """Replace each secret and each piece of personal data by `by`."""
    if SUSPECT.search(text):
        text = PREFIXES.sub(by, PEM.sub(by, text))
        text = LOGIN.sub(
            lambda match: match.group(1) + by if _is_password(match.group(2)) else match.group(), text
        )
        values = {
            found for plugin in _plugins() for found in _found_by(plugin, text) if len(found) >= SHORTEST
        }
        if values:
            text = re.compile(
                "|".join(re.escape(value) for value in sorted(values, key=len, reverse=True))
            ).sub(by, text)
        text = RANDOM.sub(lambda match: by if _is_random(match) else match.group(), text)
    text = ASSIGNED.sub(lambda match: match[1] + by if _is_chosen(match) else match.group(), text)
    masked, kinds = mask_personal(text)
    for kind in kinds:
        masked = masked.replace(MASK.format(kind), by)
    return masked


def _found_by(plugin: Any, text: str) -> Iterator[str]:
    """Yield whole matches; the plugin's own `analyze_string` would yield their groups."""
    for piece in _pieces(text):
        for expression in plugin.denylist:
            yield from (match.group() for match in expression.finditer(piece))


def _pieces(text: str) -> Iterator[str]:
    """Cut the text into lines, and long lines into pieces that overlap by more than a token's length."""
    for line in text.splitlines():
        for start in range(0, max(1, len(line) - OVERLAP), PIECE - OVERLAP):
            yield line[start : start + PIECE]


def _is_password(text: str) -> bool:
    return text.lower() not in PLACEHOLDERS and text[0] not in "{<$%*[" and len(set(text)) > 1


def _is_chosen(match: re.Match[str]) -> bool:
    """Tell whether what is assigned looks chosen as a password, not like a word, a name or a reference.

    It has a digit and a letter, and in quotes or after `=` nothing more is asked; after a colon, as in prose,
    also both cases or a sign.
    """
    value = match["value"].rstrip(".!?")
    if len(value) < SHORTEST or DUMMY.search(value) or REFERENCE.match(value) or len(set(value)) < 5:
        return False
    if value.lower().strip("0123456789_-") in PLACEHOLDERS or not (
        re.search(r"\d", value) and re.search(r"[A-Za-z]", value)
    ):
        return False
    is_prose = not match["quote"] and match[1].rstrip().endswith(":")
    is_mixed = re.search("[a-z]", value) and re.search("[A-Z]", value)
    return not is_prose or bool(is_mixed) or re.search(r"[^\w.-]", value) is not None


@cache
def _plugins() -> list[Any]:
    from importlib import import_module

    return [getattr(import_module(f"detect_secrets.plugins.{module}"), name)() for module, name in PLUGINS]


def _is_random(match: re.Match[str]) -> bool:
    """Tell whether a token has digits, both cases and high entropy, and follows a word such as `key`."""
    token = match.group()
    if not (re.search(r"\d.*\d.*\d", token) and re.search("[a-z]", token) and re.search("[A-Z]", token)):
        return False
    counts = Counter(token)
    if -sum(count / len(token) * math.log2(count / len(token)) for count in counts.values()) < RANDOM_BITS:
        return False
    return NAMED.search(match.string[max(0, match.start() - 80) : match.start()]) is not None


# --- personal data ------------------------------------------------------------------------------------------


def find_personal(text: str) -> list[str]:
    """Return the kinds of personal data in the text, in the order of KINDS."""
    return mask_personal(text)[1]


def mask_personal(text: str) -> tuple[str, list[str]]:
    """Replace each finding by the name of its kind; return the text and the kinds found."""
    found: list[str] = []
    if "@" not in text and not NUMBERS.search(text):
        return text, found
    for kind, pattern, real_part in KINDS:
        masked = _mask_kind(text, kind, pattern, real_part)
        if masked != text:
            text = masked
            found.append(kind)
    return text, found


def _mask_kind(text: str, kind: str, pattern: re.Pattern[str], real_part: Callable[[str], int]) -> str:
    """Mask the first `real_part(match)` characters of each match; 0: the match is a false one."""

    def put(match: re.Match[str]) -> str:
        found = match.group()
        length = real_part(found)
        return MASK.format(kind) + found[length:] if length else found

    return pattern.sub(put, text)


def card_part(found: str) -> int:
    """Return the length of a valid card number, else 0: ISO/IEC 7812-1, annex B (Luhn)."""
    digits = [int(char) for char in found if char.isdigit()]
    total = sum(
        sum(divmod(2 * digit, 10)) if place % 2 else digit for place, digit in enumerate(reversed(digits))
    )
    return len(found) if total % 10 == 0 else 0


def iban_part(found: str) -> int:
    """Return the length of the longest beginning that is an IBAN, or 0; a match may include the next word.

    ISO 13616: 15 to 34 characters, modulo 97.
    """
    for length in range(len(found), 14, -1):
        plain = found[:length].replace(" ", "")
        if (
            found[length - 1] != " "
            and 15 <= len(plain) <= 34
            and int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1
        ):
            return length
    return 0


KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], int]], ...] = (
    ("email", EMAIL, len),
    ("iban", IBAN, iban_part),
    ("card", CARD, card_part),
    ("national id", NATIONAL, len),
    ("phone", PHONE, len),
)


# --- names of people ----------------------------------------------------------------------------------------


def mask_names(text: str, model: str, by: str) -> str:
    """Replace each person's name by `by`. Raises ConfigError: the extra or the model is not installed."""
    found = sorted(
        _analyzer(model).analyze(text, language="en", entities=[ENTITY], score_threshold=LEAST_SCORE),
        key=lambda one: one.start,
        reverse=True,  # from the end, so that the other positions stay valid
    )
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
        raise ConfigError(
            f"prepare.names_model is {model!r}, and {error.name} is not installed",
            remedy="pip install 'ratchet[names]', or leave the key empty",
        ) from None
    try:
        loaded = spacy.load(model)
    except OSError:
        raise ConfigError(
            f"prepare.names_model is {model!r}, and spaCy knows no such model",
            remedy=f"python -m spacy download {model}, or name a folder that holds one",
        ) from None
    engine = SpacyNlpEngine(ner_model_configuration=NerModelConfiguration())
    engine.nlp = {"en": loaded}  # Presidio's own loader would download a missing model
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
