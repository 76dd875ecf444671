"""Credentials appear whole or not at all; what is wrong with them is said with its file and its remedy."""

from __future__ import annotations

import os
import re
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from certificates import copy, reissue
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from headrace.world import credentials as module
from headrace.world.credentials import Credentials, CredentialsError, load_credentials, make_credentials

FILES = ["ca.key", "ca.pem", "cluster.key", "node.key", "node.pem"]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_they_are_made_once_and_are_their_owners(tmp_path: Path) -> None:
    where = tmp_path / "deep" / "credentials"
    made = make_credentials(where)
    assert sorted(contents(where)) == FILES
    assert stat.S_IMODE(where.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in where.iterdir()} == {0o600}
    before = contents(where)
    assert make_credentials(str(where)) == load_credentials(where) == made
    assert contents(where) == before
    assert made.cluster_key == before["cluster.key"]
    assert len(made.cluster_key) == 32
    assert made.cluster_key.hex() not in repr(made)
    assert os.listdir(where.parent) == ["credentials"]


def test_every_cluster_has_its_own(tmp_path: Path) -> None:
    one, another = (contents(make_credentials(tmp_path / name).directory) for name in ("one", "another"))
    assert not set(one.values()) & set(another.values())


def test_the_umask_and_an_empty_directory_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(mode=0o755)
    former = os.umask(0)
    try:
        make_credentials(tmp_path / "empty")
    finally:
        os.umask(former)
    load_credentials(tmp_path / "empty")
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o700


def test_what_the_certificate_says(credentials: Credentials) -> None:
    node = x509.load_pem_x509_certificate((credentials.directory / "node.pem").read_bytes())
    authority = x509.load_pem_x509_certificate((credentials.directory / "ca.pem").read_bytes())
    names = node.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["headrace"]
    assert not node.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    for certificate in (node, authority):
        assert certificate.not_valid_before_utc < datetime.now(UTC) - timedelta(hours=23)
        assert certificate.not_valid_after_utc > datetime.now(UTC) + module.VALIDITY - timedelta(hours=1)


def test_both_contexts_verify_and_speak_nothing_older(credentials: Credentials) -> None:
    for context in (credentials.server_context(), credentials.client_context()):
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert len(context.get_ca_certs()) == 1  # and none of the system's
    assert credentials.client_context().check_hostname
    assert credentials.server_context().num_tickets == 0


def test_where_nobody_signs_the_authoritys_key_is_not_needed(
    credentials: Credentials, tmp_path: Path
) -> None:
    where = copy(credentials.directory, tmp_path / "copy")
    (where / "ca.key").unlink()
    for name in ("ca.pem", "node.pem"):
        (where / name).chmod(0o644)  # public
    where.chmod(0o755)
    assert load_credentials(where).cluster_key == credentials.cluster_key


def test_an_authority_may_be_replaced_while_both_are_trusted(
    credentials: Credentials, tmp_path: Path
) -> None:
    new = make_credentials(tmp_path / "new").directory
    old = copy(credentials.directory, tmp_path / "old")
    both = (new / "ca.pem").read_bytes() + (old / "ca.pem").read_bytes()
    for where in (new, old):
        (where / "ca.pem").write_bytes(both)
        assert len(load_credentials(where).client_context().get_ca_certs()) == 2


def test_makers_at_once_agree(tmp_path: Path) -> None:
    program = (
        "import sys; from headrace.world.credentials import make_credentials;"
        "sys.stdin.read(); print(make_credentials(sys.argv[1]).cluster_key.hex())"
    )
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "credentials")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.close()
    keys = set()
    for maker in makers:
        assert maker.stdout is not None
        keys.add(maker.stdout.read())
        maker.stdout.close()
        assert maker.wait(30) == 0
    assert keys == {load_credentials(tmp_path / "credentials").cluster_key.hex() + "\n"}
    assert os.listdir(tmp_path) == ["credentials"]


def test_who_comes_second_takes_what_the_first_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "credentials"
    new_files = module._new_files

    def slowly(now: datetime) -> dict[str, bytes]:
        monkeypatch.setattr(module, "_new_files", new_files)
        make_credentials(where)
        return new_files(now)

    monkeypatch.setattr(module, "_new_files", slowly)
    made = make_credentials(where)
    assert made.cluster_key == (where / "cluster.key").read_bytes()
    assert os.listdir(tmp_path) == ["credentials"]


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = module._write

    def fail_at_last(path: Path, content: bytes) -> None:
        if path.name == "cluster.key":
            raise OSError(28, "no space left on device")
        write(path, content)

    monkeypatch.setattr(module, "_write", fail_at_last)
    with pytest.raises(OSError, match="no space left"):
        make_credentials(tmp_path / "credentials")
    assert os.listdir(tmp_path) == []


def replace(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda where: (where / name).write_bytes(content)


def truncate(name: str, to: int) -> Callable[[Path], object]:
    return lambda where: os.truncate(where / name, to)


def swap(*names: str) -> Callable[[Path], object]:
    """Take files from another cluster."""

    def damage(where: Path) -> None:
        other = make_credentials(where.parent / "other").directory
        for name in names:
            (other / name).rename(where / name)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    **{
        f"no {name}": (lambda where, name=name: (where / name).unlink(), f"{name} is missing", "copy it")
        for name in FILES
        if name != "ca.key"
    },
    **{
        f"{name} cut short": (truncate(name, 100), f"{name} holds no", "copy it")
        for name in FILES
        if name != "cluster.key"
    },
    **{f"{name} empty": (truncate(name, 0), f"{name} holds no", "copy it") for name in FILES},
    "cluster.key cut short": (truncate("cluster.key", 31), "31 bytes instead of 32", "copy it"),
    "cluster.key too long": (replace("cluster.key", bytes(33)), "33 bytes instead of 32", "copy it"),
    "not text": (replace("node.pem", bytes(range(256))), "node.pem holds no certificate", "copy it"),
    **{
        f"{name} open to others": (
            lambda where, name=name: (where / name).chmod(0o640),
            f"{name} has mode 0640, so others may use it",
            f"chmod 600 .*{name}",
        )
        for name in ("ca.key", "node.key", "cluster.key")
    },
    "others may trust": (
        lambda where: (where / "ca.pem").chmod(0o664),
        r"ca\.pem has mode 0664, so others may change it",
        r"chmod 600 .*ca\.pem",
    ),
    "others may add": (lambda where: where.chmod(0o770), "has mode 0770", "chmod 700"),
    "another's node.key": (swap("node.key"), r"node\.key is the key of another", "copy it"),
    "another's ca.key": (swap("ca.key"), r"ca\.key is the key of another", "copy it"),
    "another's authority": (swap("ca.pem", "ca.key"), r"node\.pem was not signed by", "copy it"),
    "expired": (
        lambda where: reissue(where, from_days=-9, to_days=-1),
        r"node\.pem expired at 20\d\d-\d\d-\d\d \d\d:\d\d UTC",
        "make new ones",
    ),
    "not yet": (
        lambda where: reissue(where, from_days=1, to_days=9),
        r"node\.pem is valid only from 20",
        "clock",
    ),
    "of another name": (
        lambda where: reissue(where, name="example.org"),
        r"node\.pem does not carry the name headrace",
        "use one for",
    ),
    "for servers only": (
        lambda where: reissue(where, purposes=(ExtendedKeyUsageOID.SERVER_AUTH,)),
        r"node\.pem is not for servers and clients both",
        "use one for",
    ),
    "a directory for a file": (
        lambda where: ((where / "node.pem").unlink(), (where / "node.pem").mkdir()),
        r"node\.pem cannot be read \(Is a directory\)",
        "give it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_named_and_never_mended(
    damage: str, credentials: Credentials, tmp_path: Path
) -> None:
    where = copy(credentials.directory, tmp_path / "credentials")
    inflict, wrong, remedy = DAMAGES[damage]
    inflict(where)
    names = sorted(os.listdir(where))
    for use in (load_credentials, make_credentials):
        with pytest.raises(CredentialsError, match=wrong) as raised:
            use(where)
        assert re.search(remedy, str(raised.value))
        assert str(where) in str(raised.value)
    assert sorted(os.listdir(where)) == names


def test_places_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o600)
    with pytest.raises(CredentialsError, match="does not exist"):
        load_credentials(tmp_path / "nowhere")
    for use in (load_credentials, make_credentials):
        with pytest.raises(CredentialsError, match="is no directory"):
            use(tmp_path / "file")


def test_files_that_vanish_before_they_are_used(credentials: Credentials, tmp_path: Path) -> None:
    loaded = load_credentials(copy(credentials.directory, tmp_path / "credentials"))
    (loaded.directory / "node.key").unlink()
    with pytest.raises(CredentialsError, match="changed while they were read"):
        loaded.server_context()
