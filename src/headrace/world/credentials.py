"""What a cluster's processes know each other by: a directory of certificates and keys, made once and copied.

In: a directory. Out: `Credentials`: the two `ssl.SSLContext`s of mutual TLS and the cluster's key. It knows
files and certificates, but no sockets and no messages.

    ca.pem       the cluster's own authority; two of them while one replaces the other
    ca.key       its key; only where certificates are made
    node.pem     the certificate that every process of the cluster shows
    node.key     its key
    cluster.key  32 random bytes: the key of KV block identities

Workers move between hosts, so a certificate names no host. A peer is of the cluster when the cluster's
authority signed its certificate and the certificate carries `NODE_NAME`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import ssl
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from headrace.world.tls import NODE_NAME

VALIDITY = timedelta(days=5 * 365)
"""How long certificates made here are valid."""

CLOCK_TOLERANCE = timedelta(days=1)
"""How far a certificate's validity begins in the past, for hosts whose clocks are behind."""

CLUSTER_KEY_BYTES = 32

AUTHORITY, AUTHORITY_KEY = "ca.pem", "ca.key"
NODE, NODE_KEY, CLUSTER_KEY = "node.pem", "node.key", "cluster.key"

_T = TypeVar("_T")


class CredentialsError(ValueError):
    """Credentials that cannot be used: the message names the file, what is wrong with it, and the remedy."""


@dataclass(frozen=True)
class Credentials:
    """A directory that was found whole, and what is needed of it beside TLS."""

    directory: Path
    cluster_key: bytes = field(repr=False)
    """32 bytes, the same everywhere in the cluster."""

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 for accepting: shows the node's certificate and demands one of the cluster's authority.

        It cannot ask for `NODE_NAME`, which is left to who uses it. There are no session tickets: each
        connection shows its certificate anew.
        """
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.num_tickets = 0
        return context

    def client_context(self) -> ssl.SSLContext:
        """TLS 1.3 for connecting with `server_hostname=NODE_NAME`: shows the node's certificate too."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, purpose: ssl._SSLMethod) -> ssl.SSLContext:
        context = ssl.SSLContext(purpose)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(self.directory / NODE, self.directory / NODE_KEY)
            context.load_verify_locations(self.directory / AUTHORITY)
        except OSError as error:  # the files were whole when they were loaded; somebody changes them
            raise CredentialsError(
                f"the certificates in {self.directory} changed while they were read: {error}"
            ) from error
        return context


def make_credentials(directory: Path | str) -> Credentials:
    """Load the credentials in `directory`, making them first where there are none.

    They appear there all at once or not at all; two processes that make them at once both load the same.
    Raises CredentialsError for a directory that has anything but whole credentials, OSError where none can
    be made.
    """
    directory = Path(directory)
    if _is_absent(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        unnamed = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))  # mode 0700
        try:
            for name, content in _new_files(datetime.now(UTC)).items():
                _write(unnamed / name, content)
            _rename(unnamed, directory)
        finally:
            shutil.rmtree(unnamed, ignore_errors=True)
    return load_credentials(directory)


def load_credentials(directory: Path | str) -> Credentials:
    """Load credentials and see that they are whole, private, valid now, and belong together.

    Raises CredentialsError.
    """
    directory = Path(directory)
    _check_directory(directory)
    authorities = _read_certificates(directory / AUTHORITY)
    node = _read_certificates(directory / NODE)[0]
    authority = _find_issuer(directory / NODE, node, authorities)
    _check_time(directory / AUTHORITY, authority)
    _check_time(directory / NODE, node)
    _check_node(directory / NODE, node)
    _check_key(directory / NODE_KEY, [node])
    if (directory / AUTHORITY_KEY).exists():
        _check_key(directory / AUTHORITY_KEY, authorities)
    cluster_key = _read(directory / CLUSTER_KEY, "cluster key", _cluster_key, secret=True)
    return Credentials(directory, cluster_key)


# Making.


def _new_files(now: datetime) -> dict[str, bytes]:
    authority_key = ec.generate_private_key(ec.SECP256R1())
    node_key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own for each authority: messages about a wrong one then say something.
    authority_name = _name(f"headrace authority {secrets.token_hex(4)}")
    authority = (
        _certificate(authority_name, authority_name, authority_key, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    node = (
        _certificate(_name("headrace node"), authority_name, node_key, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NODE_NAME)]), critical=False)
        .add_extension(authority_id, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return {
        AUTHORITY: authority.public_bytes(serialization.Encoding.PEM),
        AUTHORITY_KEY: _pem(authority_key),
        NODE: node.public_bytes(serialization.Encoding.PEM),
        NODE_KEY: _pem(node_key),
        CLUSTER_KEY: secrets.token_bytes(CLUSTER_KEY_BYTES),
    }


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _is_absent(directory: Path) -> bool:
    try:
        return not any(directory.iterdir())
    except FileNotFoundError:
        return True
    except OSError:
        return False  # loading says what is wrong with it


def _write(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rename(unnamed: Path, directory: Path) -> None:
    """Give whole credentials their name, unless another process was first."""
    try:
        os.rename(unnamed, directory)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


# Loading.

_COPY = "copy it from a machine of the cluster, or remove the directory on every machine and make new ones"
_RENEW = "make new ones: remove the directory, start once, and copy what it then has to every machine"


def _check_directory(directory: Path) -> None:
    try:
        mode = directory.stat().st_mode
    except FileNotFoundError as error:
        raise CredentialsError(
            f"{directory} does not exist: make credentials, or copy those of a machine of the cluster there"
        ) from error
    except OSError as error:
        raise CredentialsError(
            f"{directory} cannot be read ({error.strerror}): give it to this user"
        ) from error
    if not stat.S_ISDIR(mode):
        raise CredentialsError(f"{directory} is no directory: name one for credentials")
    if mode & 0o022:
        raise CredentialsError(
            f"{directory} has mode {stat.S_IMODE(mode):04o}, so others may put files into it: "
            f"chmod 700 {directory}"
        )


def _read(path: Path, what: str, parse: Callable[[bytes], _T], *, secret: bool) -> _T:
    """Read one file. Nobody but its owner may write it, nor read it if it is secret."""
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CredentialsError(f"{path} is missing: {_COPY}") from error
    except OSError as error:
        raise CredentialsError(f"{path} cannot be read ({error.strerror}): give it to this user") from error
    if mode & (0o077 if secret else 0o022):
        may = "use" if secret else "change"
        raise CredentialsError(
            f"{path} has mode {stat.S_IMODE(mode):04o}, so others may {may} it: chmod 600 {path}"
        )
    try:
        return parse(content)
    except (ValueError, TypeError) as error:  # a TypeError tells of a key under a password
        raise CredentialsError(f"{path} holds no {what} ({error}): {_COPY}") from error


def _read_certificates(path: Path) -> list[x509.Certificate]:
    return _read(path, "certificate", x509.load_pem_x509_certificates, secret=False)


def _find_issuer(path: Path, node: x509.Certificate, authorities: list[x509.Certificate]) -> x509.Certificate:
    for authority in authorities:
        with contextlib.suppress(InvalidSignature, ValueError, TypeError):
            node.verify_directly_issued_by(authority)
            return authority
    raise CredentialsError(f"{path} was not signed by the authority in {AUTHORITY} beside it: {_COPY}")


def _check_key(path: Path, certificates: list[x509.Certificate]) -> None:
    key = _read(
        path, "private key", lambda content: serialization.load_pem_private_key(content, None), secret=True
    )
    if all(key.public_key() != certificate.public_key() for certificate in certificates):
        raise CredentialsError(f"{path} is the key of another certificate than {path.stem}.pem: {_COPY}")


def _cluster_key(content: bytes) -> bytes:
    if len(content) != CLUSTER_KEY_BYTES:
        raise ValueError(f"it has {len(content)} bytes instead of {CLUSTER_KEY_BYTES}")
    return content


def _check_time(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.now(UTC)
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > last:
        raise CredentialsError(f"{path} expired at {last:%Y-%m-%d %H:%M} UTC: {_RENEW}")
    if now < first:
        raise CredentialsError(
            f"{path} is valid only from {first:%Y-%m-%d %H:%M} UTC on: see to this machine's clock"
        )


def _check_node(path: Path, node: x509.Certificate) -> None:
    try:
        names = node.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        purposes = node.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError) as error:
        raise CredentialsError(f"{path} says neither whose it is nor what for ({error}): {_NODE}") from error
    if NODE_NAME not in names.get_values_for_type(x509.DNSName):
        raise CredentialsError(f"{path} does not carry the name {NODE_NAME}: {_NODE}")
    if not {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= set(purposes):
        raise CredentialsError(f"{path} is not for servers and clients both: {_NODE}")


_NODE = f"use one for the DNS name {NODE_NAME}, for serverAuth and clientAuth"
