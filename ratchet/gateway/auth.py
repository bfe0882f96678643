"""API keys of the gateway: `.ratchet/keys.json` keeps their SHA-256 and scopes, never the keys themselves.

Once the file exists, every request needs a key; a running gateway notices changes at once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ratchet.errors import CheckoutError, UserError
from ratchet.files import write_private
from ratchet.serving.faults import Fault

FILE = Path(".ratchet/keys.json")
SCOPES = ("infer", "feedback", "admin")
PREFIX = "sk-ratchet-"  # scanners for secrets, and the log's redaction, recognise `sk-`


class Key(msgspec.Struct, frozen=True):
    """A key and its scopes; `created` is in seconds since 1970.

    `digest` is the SHA-256 of the key in hex; 256 random bits need no salt and no slow hash.
    """

    name: str
    digest: str
    scopes: list[str]
    created: float

    @property
    def may_choose_version(self) -> bool:
        return bool(self.name) and "admin" in self.scopes


NOBODY = Key("", "", list(SCOPES), 0.0)  # the caller on loopback, as long as there are no keys


def add_key(root: Path, name: str, scopes: Iterable[str]) -> str:
    """Add a key and return it; it cannot be shown again.

    Raises UserError: the name is taken, a scope is unknown, or there is none.
    """
    keys, wanted = list_keys(root), [scope.strip() for scope in scopes]
    if not name or any(key.name == name for key in keys):
        raise UserError(
            f"the name {name!r} is {'taken' if name else 'empty'}",
            remedy="choose another, or revoke that key first (`ratchet keys revoke`)",
        )
    if not wanted:
        raise UserError("no scope is named", remedy=f"known: {', '.join(SCOPES)}")
    if unknown := [scope for scope in wanted if scope not in SCOPES]:
        raise UserError(
            f"unknown scope {', '.join(map(repr, unknown))}", remedy=f"known: {', '.join(SCOPES)}"
        )
    key = PREFIX + secrets.token_urlsafe(32)
    _write_keys(root, [*keys, Key(name, _digest(key), wanted, time.time())])
    return key


def list_keys(root: Path) -> list[Key]:
    """List the keys. Raises CheckoutError for a file that holds no keys."""
    try:
        return msgspec.json.decode((root / FILE).read_bytes(), type=list[Key])
    except FileNotFoundError:
        return []
    except msgspec.DecodeError as error:
        raise CheckoutError(
            f"{FILE} holds no keys: {error}", remedy="remove it and make new keys with `ratchet keys add`"
        ) from None


def revoke_key(root: Path, name: str) -> None:
    """Revoke a key. Raises UserError when there is none of that name.

    Revoking the last key does not open the gateway: the empty file stays.
    """
    keys = list_keys(root)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise UserError(
            f"no key is named {name!r}", remedy=f"known: {', '.join(key.name for key in keys) or 'none'}"
        )
    _write_keys(root, left)


class Doorkeeper:
    """The check of a request's key and its scopes.

    The file is read again when it has changed. `required`: keys are needed even if there is no file.
    """

    def __init__(self, root: Path, *, required: bool) -> None:
        self._path, self._root, self._required = root / FILE, root, required
        self._seen: tuple[int, int, int] | None = None
        self._keys: list[Key] = []

    def admit(self, header: str, scope: str) -> Key:
        """Return the key that an `Authorization` header holds.

        Raises Fault: 401 for none or a wrong one, 403 for one without the scope.
        """
        key = self._find(_read_header(header)) if self._are_needed() else NOBODY
        if scope not in key.scopes:
            raise Fault(
                403,
                f"the key {key.name!r} has the scopes {', '.join(key.scopes)}; this needs {scope}",
                remedy=f"make one with `ratchet keys add NAME --scopes {scope}`",
                code="missing_scope",
            )
        return key

    def _are_needed(self) -> bool:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._seen, self._keys = None, []
            return self._required
        seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if seen != self._seen:
            try:
                self._keys, self._seen = list_keys(self._root), seen
            except CheckoutError as error:  # a broken file admits nobody
                raise Fault(503, str(error), code="no_keys") from None
        return True

    def _find(self, shown: str) -> Key:
        digest, found = _digest(shown), None
        for key in self._keys:  # all of them, so that the time taken reveals nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None or not shown:
            raise Fault(
                401,
                "the API key is not known" if shown else "no API key was sent",
                remedy="send `Authorization: Bearer KEY`; `ratchet keys add NAME` makes one",
                code="invalid_api_key",
            )
        return found


def _write_keys(root: Path, keys: list[Key]) -> None:
    write_private(root / FILE, msgspec.json.format(msgspec.json.encode(keys), indent=2) + b"\n")


def _read_header(header: str) -> str:
    """Return the key of `Bearer KEY`, or the password of basic authentication, which browsers ask for."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "basic":
        return _read_password(value.strip())
    return value.strip() if scheme.lower() == "bearer" else ""


def _read_password(value: str) -> str:
    try:
        return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8")).hexdigest()
