"""Secrets and personal data in texts: found, named, masked; the value itself goes nowhere.

Secrets are told by detect-secrets' plugins and a few prefixes that it does not know; personal data by expressions with the checks
that the numbers carry (Luhn for cards, ISO 13616's modulo 97 for IBANs). Not covered: names of people and places.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

MASK = "[{}]"  # an e-mail address becomes [email]
# Any secret has a long token, a password in a URL, or says that it is a key: most texts have none of these, and no plugin runs.
SUSPECT = re.compile(r"[A-Za-z0-9_+/=-]{20}|://[^\s/@]+:[^\s/@]+@|PRIVATE KEY|PuTTY-User-Key", re.ASCII)
PREFIXES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-(?:proj-|ant-|or-)?[A-Za-z0-9_-]{20,}|github_pat_\w{20,}|AIza[\w-]{35}|npm_[A-Za-z0-9]{36}|xox[a-z]-[A-Za-z0-9-]{10,})", re.ASCII
)
PEM = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----|\Z)", re.DOTALL)
RANDOM = re.compile(r"(?<![A-Za-z0-9_+/=.-])[A-Za-z0-9_+/=-]{32,200}(?![A-Za-z0-9_+/=-])", re.ASCII)
RANDOM_BITS = 4.4  # of entropy a character: hexadecimal has at most 4, words in CamelCase about 4
PLUGINS = (
    ("aws", "AWSKeyDetector"),
    ("azure_storage_key", "AzureStorageKeyDetector"),
    ("basic_auth", "BasicAuthDetector"),
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
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}+@[\w-]{1,63}(?:\.[\w-]{1,63})+")
PHONE = re.compile(r"(?<![\w.+-])(?:\+[1-9]\d{0,2}[ ./-]?(?:\(\d{1,4}\)[ ./-]?)?\d(?:[ ./-]?\d){6,11}|\(\d{3}\) ?\d{3}[-. ]\d{4}|\d{3}-\d{3}-\d{4})(?![\w-])")
CARD = re.compile(r"(?<![\w.-])(?<!\d )(?:[3-6]\d{12,18}|[3-6]\d{3}([ -])\d{4}\1\d{4}\1\d{1,7}|3\d{3}([ -])\d{6}\2\d{5})(?![\w-]|\.\d| \d)")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
NATIONAL = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
NUMBERS = re.compile(r"\d(?:[ ()./+-]{0,2}\d){6}|[A-Z]{2}\d\d")


def find_secret(text: str) -> str | None:
    """Kind of the first secret in the text."""
    if not SUSPECT.search(text):
        return None
    if PREFIXES.search(text):
        return "API key"
    for plugin in _plugins():
        if any(plugin.analyze_string(text)):
            return str(plugin.secret_type)
    return "random string" if any(_is_random(match.group()) for match in RANDOM.finditer(text)) else None


def redact(text: str, by: str) -> str:
    """`by` in place of each secret and each piece of personal data."""
    if SUSPECT.search(text):
        text = PREFIXES.sub(by, PEM.sub(by, text))
        for value in sorted({found.secret_value for plugin in _plugins() for found in _analyze(plugin, text)}, key=len, reverse=True):
            text = text.replace(value, by)
        text = RANDOM.sub(lambda match: by if _is_random(match.group()) else match.group(), text)
    masked, kinds = mask_personal(text)
    for kind in kinds:
        masked = masked.replace(MASK.format(kind), by)
    return masked


def _analyze(plugin: Any, text: str) -> list[Any]:
    return [found for line in text.splitlines() for found in plugin.analyze_line(filename="", line=line)]


@cache
def _plugins() -> list[Any]:
    from importlib import import_module

    return [getattr(import_module(f"detect_secrets.plugins.{module}"), name)() for module, name in PLUGINS]


def _is_random(token: str) -> bool:
    """Digits and both cases, spread evenly."""
    if not (re.search(r"\d.*\d.*\d", token) and re.search("[a-z]", token) and re.search("[A-Z]", token)):
        return False
    counts = Counter(token)
    return -sum(count / len(token) * math.log2(count / len(token)) for count in counts.values()) >= RANDOM_BITS


def find_personal(text: str) -> list[str]:
    """Kinds, in the order of KINDS."""
    return mask_personal(text)[1]


def mask_personal(text: str) -> tuple[str, list[str]]:
    """The text with the kind's name in place of each finding, and the kinds."""
    found: list[str] = []
    if "@" not in text and not NUMBERS.search(text):
        return text, found
    for kind, pattern, is_real in KINDS:
        masked = pattern.sub(lambda match, kind=kind, is_real=is_real: MASK.format(kind) if is_real(match.group()) else match.group(), text)  # type: ignore[misc]
        if masked != text:
            text = masked
            found.append(kind)
    return text, found


def is_luhn(number: str) -> bool:
    """ISO/IEC 7812-1, annex B; blanks and hyphens are left out."""
    digits = [int(char) for char in number if char.isdigit()]
    return sum(sum(divmod(2 * digit, 10)) if place % 2 else digit for place, digit in enumerate(reversed(digits))) % 10 == 0


def is_iban(text: str) -> bool:
    """ISO 13616: 15 to 34 characters, modulo 97."""
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1


def _always(_: str) -> bool:
    return True


KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", EMAIL, _always),
    ("iban", IBAN, is_iban),
    ("card", CARD, is_luhn),
    ("national id", NATIONAL, _always),
    ("phone", PHONE, _always),
)
