"""API keys of the gateway: the document `.ratchet/keys.json` keeps their SHA-256 and scopes, never the keys
themselves.

Once it exists, every request needs a key; a running gateway notices changes at once, or within a second where
the document is in the shared database.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ratchet.errors import CheckoutError, RatchetError, UserError
from ratchet.serving.faults import Fault
from ratchet.storage.database import find_database
from ratchet.storage.documents import read_document, write_document

FILE = Path(".ratchet/keys.json")
SCOPES = ("infer", "feedback", "admin")
FOLLOW_SECONDS = 1.0
log = logging.getLogger("ratchet.gateway")
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
    return _decode(read_document(root, FILE))


def _decode(content: bytes | None) -> list[Key]:
    try:
        return [] if content is None else msgspec.json.decode(content, type=list[Key])
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

    The file is read again when it has changed, the shared document each second in a thread: a request does
    not wait for the database, and the keys stay known while it is down. `required`: keys are needed even if
    there are none.
    """

    def __init__(self, root: Path, *, required: bool) -> None:
        """Begin to follow the keys. Raises ServiceError while the shared database does not answer."""
        self._path, self._root, self._required = root / FILE, root, required
        self._seen: tuple[int, int, int] | None = None
        self._keys: list[Key] = []
        self._shared = find_database(root) is not None
        self._content = read_document(root, FILE) if self._shared else None
        self._ended = threading.Event()
        if self._shared:
            threading.Thread(target=self._follow, name="keys", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def _follow(self) -> None:
        told = ""
        while not self._ended.wait(FOLLOW_SECONDS):
            try:
                self._content, told = read_document(self._root, FILE), ""
            except RatchetError as error:
                if str(error) != told:
                    log.warning("API keys stay as they were: %s", error)
                told = str(error)

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
        if self._shared:
            return self._read(self._content)
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

    def _read(self, content: bytes | None) -> bool:
        try:
            self._keys = _decode(content)
        except CheckoutError as error:  # a broken document admits nobody
            raise Fault(503, str(error), code="no_keys") from None
        return self._required or content is not None

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
    content = msgspec.json.format(msgspec.json.encode(keys), indent=2) + b"\n"
    write_document(root, FILE, content, private=True)


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
