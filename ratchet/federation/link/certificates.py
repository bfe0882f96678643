"""Make the keys of a federation: the coordinator's authority and certificate, and each node's own key."""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ratchet.errors import UserError
from ratchet.files import write_private, write_text

AUTHORITY, CERTIFICATE, KEY = "authority.pem", "certificate.pem", "certificate.key"
AUTHORITY_KEY = "authority.key"
DAYS = 825  # a certificate's life; the authority's is four times that
RENEWED = dt.timedelta(days=30)  # before its end


def make_certificates(folder: Path, hosts: Sequence[str]) -> bool:
    """Make the authority once, and its certificate for `hosts`; return whether one was made.

    A certificate that ends soon or lacks one of the hosts is made again; nodes trust the authority, so they
    notice nothing.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = False
    if not (folder / AUTHORITY_KEY).exists() or not (folder / AUTHORITY).exists():
        key = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a federation's coordinator")])
        builder = _builder(name, name, key.public_key(), 4 * DAYS).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        write_private(folder / AUTHORITY_KEY, _private(key))
        write_text(folder / AUTHORITY, _public(builder.sign(key, hashes.SHA384())))
        made = True
    if made or not _serves(folder, hosts):
        _make_certificate(folder, hosts)
        made = True
    return made


def _serves(folder: Path, hosts: Sequence[str]) -> bool:
    try:
        found = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (folder / KEY).stat()
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    soon = dt.datetime.now(dt.UTC) + RENEWED
    return found.not_valid_after_utc > soon and {_general_name(host) for host in hosts} <= set(names)


def _make_certificate(folder: Path, hosts: Sequence[str]) -> None:
    authority = x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes())
    authority_key = load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    builder = (
        _builder(name, authority.subject, key.public_key(), DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
    )
    write_private(folder / KEY, _private(key))
    write_text(folder / CERTIFICATE, _public(builder.sign(authority_key, hashes.SHA384())))


def _builder(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    signs = name == issuer
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=signs,
                crl_sign=signs,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _public(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def node_key(path: Path) -> str:
    """Return the public half, as OpenSSH writes it, of the node's key; make the key where there is none.

    Raises UserError: the file holds no such key.
    """
    if not path.exists():
        made = ec.generate_private_key(ec.SECP384R1())
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except ValueError as error:
        raise UserError(
            f"{path} holds no key that can be read: {error}",
            remedy="remove it, and ask the coordinator for another invitation",
        ) from None
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def check_public_key(path: Path) -> None:
    """Raise UserError unless a file holds a public key as `ratchet federate key` prints it."""
    try:
        key, why = load_ssh_public_key(path.read_bytes()), "it is of another kind"
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        key, why = None, str(error)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError(
            f"{path} holds no public key of a node: {why}", remedy="on the node: ratchet federate key > FILE"
        )
