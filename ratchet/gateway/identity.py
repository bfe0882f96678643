"""Make signed request ids, so that forged ones are recognised, and pseudonyms in place of users.

Both depend on the document `.ratchet/gateway.key`, made at the first start; gateways with a shared database
have one key together. If it is lost, old ids are no longer accepted, and every user counts as new.
"""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

from ratchet.errors import CheckoutError
from ratchet.storage.documents import make_document, read_document

FILE = Path(".ratchet/gateway.key")
KEY_BYTES = 32
CHAT, RESPONSE = "chatcmpl-", "resp_"  # as OpenAI's ids begin


class Ids:
    def __init__(self, root: Path) -> None:
        """Read or make the key. Raises CheckoutError when the key is not ours, ServiceError."""
        self._key = _read_key(root)

    def make(self, head: str = CHAT) -> str:
        """Make an id: `chatcmpl-<96 random bits>-<64 bits of HMAC>`, in hex; of a response `resp_…`."""
        random = secrets.token_hex(12)
        return f"{head}{random}-{self._sign(b'id', random)}"

    def is_ours(self, id: str) -> bool:
        random, _, signature = id.removeprefix(CHAT).removeprefix(RESPONSE).partition("-")
        return id.startswith((CHAT, RESPONSE)) and hmac.compare_digest(
            self._sign(b"id", random).encode(), signature.encode("utf-8", "replace")
        )

    def pseudonym(self, user: str) -> str:
        """Return 16 hex digits that stand for a user in the log and in a rollout; empty for no user."""
        return self._sign(b"user", user) if user else ""

    def sender(self, key: str) -> str:
        """Return the pseudonym of an API key's name: 16 hex digits, empty for no name."""
        return self._sign(b"key", key) if key else ""

    def _sign(self, purpose: bytes, text: str) -> str:
        return hmac.digest(self._key, purpose + b"\0" + text.encode("utf-8", "replace"), "sha256").hex()[:16]


def known_pseudonym(root: Path, user: str) -> str:
    """Return the pseudonym that this checkout's gateway gives a user; empty where no gateway has run."""
    return Ids(root).pseudonym(user) if read_document(root, FILE) is not None else ""


def _read_key(root: Path) -> bytes:
    key = read_document(root, FILE) or make_document(root, FILE, secrets.token_bytes(KEY_BYTES))
    if len(key) != KEY_BYTES:
        raise CheckoutError(
            f"{root / FILE} holds {len(key)} bytes, wanted {KEY_BYTES}",
            remedy=(
                "remove it: feedback on earlier answers is refused from then on, and users count as new ones"
            ),
        )
    return key
