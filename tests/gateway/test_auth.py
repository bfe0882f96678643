"""API keys, request ids and pseudonyms: what is kept, who is let in, what cannot be forged."""

from __future__ import annotations

import base64
import stat
from pathlib import Path

import pytest

from ratchet.errors import CheckoutError, UserError
from ratchet.gateway.auth import FILE, Doorkeeper, add_key, list_keys, revoke_key
from ratchet.gateway.identity import Ids
from ratchet.serving.faults import Fault


def admit(root: Path, header: str, scope: str = "infer", *, required: bool = False) -> str:
    return Doorkeeper(root, required=required).admit(header, scope).name


def status(root: Path, header: str, scope: str = "infer", *, required: bool = False) -> int:
    with pytest.raises(Fault) as refused:
        admit(root, header, scope, required=required)
    return refused.value.status


def test_only_the_digest_is_kept_and_only_the_owner_reads_it(tmp_path):
    key = add_key(tmp_path, "website", ["infer"])

    kept = (tmp_path / FILE).read_text()
    assert key not in kept and key.startswith("sk-ratchet-") and len(key) > 50
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_without_keys_loopback_is_open_and_the_rest_is_closed(tmp_path):
    assert admit(tmp_path, "") == ""
    assert status(tmp_path, "", required=True) == 401


def test_one_key_closes_loopback_too(tmp_path):
    key = add_key(tmp_path, "website", ["infer"])

    assert status(tmp_path, "") == 401
    assert status(tmp_path, "Bearer sk-ratchet-wrong") == 401
    assert status(tmp_path, f"Bearer {key}x") == 401
    assert admit(tmp_path, f"Bearer {key}") == "website"
    assert admit(tmp_path, f"bearer {key}") == "website"


def test_a_browser_sends_the_key_as_a_password(tmp_path):
    key = add_key(tmp_path, "me", ["admin"])

    assert admit(tmp_path, "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode(), "admin") == "me"
    assert status(tmp_path, "Basic ???", "admin") == 401
    assert status(tmp_path, "Basic " + base64.b64encode(b"\xff\xfe").decode(), "admin") == 401


def test_a_scope_that_the_key_lacks_is_403_and_names_it(tmp_path):
    key = add_key(tmp_path, "website", ["infer"])

    with pytest.raises(Fault, match="'website' has the scopes infer; this needs feedback") as refused:
        admit(tmp_path, f"Bearer {key}", "feedback")
    assert refused.value.status == 403


def test_a_running_gateway_sees_new_and_revoked_keys_at_once(tmp_path):
    door = Doorkeeper(tmp_path, required=True)
    key = add_key(tmp_path, "website", ["infer"])
    assert door.admit(f"Bearer {key}", "infer").name == "website"

    revoke_key(tmp_path, "website")

    with pytest.raises(Fault, match="not known"):
        door.admit(f"Bearer {key}", "infer")


def test_revoking_the_last_key_opens_nothing(tmp_path):
    add_key(tmp_path, "website", ["infer"])
    revoke_key(tmp_path, "website")

    assert list_keys(tmp_path) == []
    assert status(tmp_path, "") == 401


def test_a_broken_file_of_keys_lets_nobody_in(tmp_path):
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text("{")

    assert status(tmp_path, "Bearer x") == 503
    with pytest.raises(CheckoutError, match="holds no keys"):
        list_keys(tmp_path)


@pytest.mark.parametrize(
    ("name", "scopes", "message"),
    [
        ("website", ["infer"], "is taken"),
        ("", ["infer"], "is empty"),
        ("b", ["infer", "root"], "unknown scope 'root'"),
        ("b", [], "no scope"),
    ],
)
def test_a_key_that_cannot_be_made_says_why(tmp_path, name, scopes, message):
    add_key(tmp_path, "website", ["infer"])

    with pytest.raises(UserError, match=message):
        add_key(tmp_path, name, scopes)
    assert len(list_keys(tmp_path)) == 1


def test_revoking_nobody_names_who_there_is(tmp_path):
    add_key(tmp_path, "website", ["infer"])

    with pytest.raises(UserError, match="known: website"):
        revoke_key(tmp_path, "shop")


def test_ids_are_ours_after_a_restart_and_forged_ones_are_not(tmp_path):
    ids, id = Ids(tmp_path), Ids(tmp_path).make()

    assert ids.is_ours(id)
    assert stat.S_IMODE((tmp_path / ".ratchet/gateway.key").stat().st_mode) == 0o600
    for forged in (
        id[:-1] + ("0" if id[-1] != "0" else "1"),
        id.replace("chatcmpl", "cmpl"),
        id + "-x",
        "",
        "chatcmpl--",
        "chatcmpl-é-é",
        Ids(tmp_path / "other").make(),
    ):
        assert not ids.is_ours(forged), forged


def test_a_pseudonym_is_steady_and_of_this_gateway_alone(tmp_path):
    ids = Ids(tmp_path)

    assert ids.pseudonym("ana") == Ids(tmp_path).pseudonym("ana") != ids.pseudonym("bob")
    assert ids.pseudonym("ana") != Ids(tmp_path / "other").pseudonym("ana")
    assert len(ids.pseudonym("ana")) == 16 and "ana" not in ids.pseudonym("ana")
    assert ids.pseudonym("") == ""


def test_a_key_file_of_another_size_is_refused(tmp_path):
    (tmp_path / ".ratchet").mkdir()
    (tmp_path / ".ratchet/gateway.key").write_bytes(b"short")

    with pytest.raises(CheckoutError, match="5 bytes, wanted 32"):
        Ids(tmp_path)
