"""Certificates are made once, for the names that nodes use; keys are for their owner's eyes."""

from __future__ import annotations

import datetime as dt
import stat
from pathlib import Path

import pytest
from cryptography import x509

from ratchet.errors import UserError
from ratchet.federation.link import certificates
from ratchet.federation.link.certificates import AUTHORITY, CERTIFICATE, KEY, make_certificates, node_key

DAY = dt.timedelta(days=1)


def names_of(folder: Path) -> list[str]:
    found = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())
    return [
        str(name.value)
        for name in found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    ]


def test_a_certificate_is_made_once_and_again_for_another_name(tmp_path):
    folder = tmp_path / "tls"
    assert make_certificates(folder, ["127.0.0.1", "here.example"])
    assert names_of(folder) == ["127.0.0.1", "here.example"]
    authority, certificate = (folder / AUTHORITY).read_bytes(), (folder / CERTIFICATE).read_bytes()
    assert not make_certificates(folder, ["127.0.0.1"])
    assert (folder / CERTIFICATE).read_bytes() == certificate
    assert make_certificates(folder, ["there.example"])
    assert names_of(folder) == ["there.example"]
    assert (folder / AUTHORITY).read_bytes() == authority  # nodes trust it, and notice nothing
    found = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())
    found.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))


def test_a_certificate_that_ends_soon_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "DAYS", 29)
    assert make_certificates(tmp_path, ["127.0.0.1"])
    old = (tmp_path / CERTIFICATE).read_bytes()
    monkeypatch.undo()
    assert make_certificates(tmp_path, ["127.0.0.1"])
    new = x509.load_pem_x509_certificate((tmp_path / CERTIFICATE).read_bytes())
    assert new.not_valid_after_utc - x509.load_pem_x509_certificate(old).not_valid_after_utc > 700 * DAY
    assert not make_certificates(tmp_path, ["127.0.0.1"])


def test_keys_are_their_owners(tmp_path):
    make_certificates(tmp_path / "tls", ["127.0.0.1"])
    public = node_key(tmp_path / "node/key")
    assert public == node_key(tmp_path / "node/key") and public.startswith("ecdsa-sha2-nistp384 ")
    for path in (tmp_path / "tls" / KEY, tmp_path / "tls/authority.key", tmp_path / "node/key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_no_key_is_named(tmp_path):
    (tmp_path / "key").write_text("no key")
    with pytest.raises(UserError, match="holds no key"):
        node_key(tmp_path / "key")
