"""Whom `serve` lets in: what it refuses in one line before anything starts, and what it warns of."""

from __future__ import annotations

import contextlib
import logging
import re
import ssl
import subprocess
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from certificates import Authority
from hypothesis import given
from hypothesis import strategies as st

from tramontane.cluster.certificate_dates import validities
from tramontane.cluster.entrance import Entrance
from tramontane.cluster.exposure import check_entrance
from tramontane.cluster.reloading import Reloading
from tramontane.cluster.tokens import LONGEST, MOST_TOKENS, Tokens, read_tokens

ABROAD = "192.0.2.1"
TOKEN = "sesame-sesame-sesame"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """By the names that the table below gives them."""
    folder = tmp_path_factory.mktemp("files")
    authority = Authority(folder)
    (cert, key), (_, other_key) = authority.issue("server"), authority.issue("other")
    expired, expired_key = authority.issue("expired", days=-1)
    authority.rsa_key(folder / "rsa")
    (folder / "chain").write_bytes(cert.read_bytes() + expired.read_bytes())
    (folder / "tokens").write_text(f"{TOKEN}\n")
    authority.lock(key, folder / "locked")
    (folder / "long").write_bytes(b"#" * (2 << 20))
    for path in folder.iterdir():
        path.chmod(0o600)
    named = {"cert": cert, "key": key, "other key": other_key, "ca": authority.ca, "tokens": folder / "tokens"}
    named |= {"expired": expired, "expired key": expired_key, "rsa key": folder / "rsa", "chain": folder / "chain"}
    named |= {name: folder / name for name in ("locked", "long", "missing")} | {"folder": folder}
    return {name: str(path) for name, path in named.items()}


def entrance(files: dict[str, str], host: str = "127.0.0.1", **names: str) -> Entrance:
    return Entrance(host=host, **{option: files[name] for option, name in names.items()})


TLS = {"tls_cert": "cert", "tls_key": "key"}


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"tls_cert": "cert"}, "--tls-cert is {cert}, and --tls-key is not given"),
        ({"tls_key": "key"}, "--tls-key is {key}, and --tls-cert is not given"),
        ({"client_ca": "ca"}, "--client-ca is {ca}, and there is no TLS"),
        (TLS | {"tls_cert": "missing"}, "--tls-cert is {missing}, which cannot be read: No such file or directory"),
        (TLS | {"tls_cert": "folder"}, "--tls-cert is {folder}, which cannot be read: Is a directory"),
        (TLS | {"tls_key": "missing"}, "--tls-key is {missing}, which cannot be read"),
        (TLS | {"client_ca": "missing"}, "--client-ca is {missing}, which cannot be read"),
        (TLS | {"tls_cert": "tokens"}, "--tls-cert is {tokens}, which holds no certificate"),
        (TLS | {"tls_key": "cert"}, "--tls-key is {cert}, which holds no private key"),
        (TLS | {"tls_key": "locked"}, "--tls-key is {locked}, which holds no private key in PEM without a password"),
        (TLS | {"tls_key": "other key"}, "--tls-key is {other key}, which is not the key of --tls-cert, {cert}"),
        (TLS | {"tls_key": "rsa key"}, "--tls-key is {rsa key}, which is not the key of --tls-cert, {cert}"),
        (TLS | {"client_ca": "key"}, "--client-ca is {key}, which holds no certificate"),
        ({"token_file": "missing"}, "--token-file is {missing}, which cannot be read"),
        ({"token_file": "long"}, "--token-file is {long}, which is longer than"),
    ],
)
def test_what_is_wrong_is_one_line_with_option_and_value(files, names, says):
    with pytest.raises(ValueError, match="^" + re.escape(says.format(**files))) as refused:
        check_entrance(entrance(files, **names), insecure=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("host", [ABROAD, "0.0.0.0", "::", "tramontane.example"])
def test_beyond_loopback_it_takes_tls_or_a_word(files, host):
    for names in ({}, {"token_file": "tokens"}):
        with pytest.raises(ValueError, match=f"--host is {host}, beyond loopback, and there is no TLS"):
            check_entrance(entrance(files, host, **names), insecure=False)
        assert check_entrance(entrance(files, host, **names), insecure=True)
    check_entrance(entrance(files, host, **TLS), insecure=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_on_loopback_nothing_is_asked(files, host):
    assert check_entrance(entrance(files, host), insecure=False) == []


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({}, ["without --token-file: anyone who reaches it may use it"]),
        ({"token_file": "tokens"}, ["without TLS: tokens travel in clear, and who reads one may use it"]),
        (TLS, ["without --token-file or --client-ca: anyone who reaches it may use it"]),
        (TLS | {"token_file": "tokens"}, []),
        (TLS | {"client_ca": "ca"}, []),
    ],
)
def test_what_the_operator_should_think_twice_about(files, names, says):
    warnings = check_entrance(entrance(files, ABROAD, **names), insecure=True)
    assert warnings == [f"--host is {ABROAD}, beyond loopback, {text}" for text in says]


def test_a_secret_that_others_may_open_is_warned_of(files, tmp_path):
    open_to_all = tmp_path / "tokens"
    open_to_all.write_text(TOKEN)
    open_to_all.chmod(0o640)
    (warning,) = check_entrance(Entrance(token_file=str(open_to_all)), insecure=False)
    assert warning.startswith(f"--token-file is {open_to_all}, which others")


def test_a_service_spec_holds_paths_alone(files):
    whole = entrance(files, **TLS, client_ca="ca", token_file="tokens")
    check_entrance(whole, insecure=False)
    assert TOKEN not in str(asdict(whole))
    assert "PRIVATE" not in str(asdict(whole))


# Dates of certificates


def test_expired_certificates_are_warned_of(files):
    """Before anything starts: nobody who checks them would be let in."""
    (validity,) = validities(Path(files["expired"]).read_bytes())
    assert validity.not_after < datetime.now(UTC)
    for names, place in (
        ({"tls_cert": "expired", "tls_key": "expired key"}, "--tls-cert is {expired}, in which certificate 1 of 1"),
        (TLS | {"tls_cert": "chain"}, "--tls-cert is {chain}, in which certificate 2 of 2"),
        (TLS | {"client_ca": "expired"}, "--client-ca is {expired}, in which certificate 1 of 1"),
    ):
        (warning,) = check_entrance(entrance(files, **names), insecure=False)
        assert warning == f"{place.format(**files)} expired on {validity.not_after:%Y-%m-%d at %H:%M} UTC"
    assert check_entrance(entrance(files, **TLS), insecure=False) == []


def test_a_certificate_is_valid_from_its_first_day_to_its_last(files):
    """The dates are those that OpenSSL reads."""
    (validity,) = validities(Path(files["cert"]).read_bytes())
    spoken = ("openssl", "x509", "-in", files["cert"], "-noout", "-dates", "-dateopt", "iso_8601")
    said = subprocess.run(spoken, capture_output=True, text=True, check=True).stdout.split("\n")
    assert said[0] == f"notBefore={validity.not_before:%Y-%m-%d %H:%M:%SZ}"
    assert said[1] == f"notAfter={validity.not_after:%Y-%m-%d %H:%M:%SZ}"
    second = timedelta(seconds=1)
    assert [validity.flaw(end) for end in (validity.not_before, validity.not_after)] == ["", ""]
    assert validity.flaw(validity.not_before - second).startswith("is not valid before ")
    assert validity.flaw(validity.not_after + second).startswith("expired on ")


@given(st.data())
def test_whatever_a_file_of_certificates_holds_there_is_no_traceback(files, data):
    whole = bytearray(ssl.PEM_cert_to_DER_cert(Path(files["cert"]).read_text()))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, min(120, len(whole) - 1)))] = data.draw(st.integers(0, 255))
    changed = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    for pem in (ssl.DER_cert_to_PEM_cert(changed).encode(), changed, data.draw(st.binary(max_size=200))):
        for validity in validities(pem):
            validity.flaw(datetime.now(UTC))
    wrong = Path(files["folder"]) / "wrong.pem"
    wrong.write_bytes(ssl.DER_cert_to_PEM_cert(changed).encode())
    with contextlib.suppress(ValueError):
        check_entrance(replace(entrance(files, **TLS), tls_cert=str(wrong)), insecure=False)


# The file of tokens


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it holds 0 tokens"),
        ("# only a comment\n\n", "it holds 0 tokens"),
        (f"{TOKEN}\nsesame sesame sesame", "line 2 is not printable ASCII without spaces"),
        (f"{TOKEN}\x07", "line 1 is not printable"),
        (f"{TOKEN}é", "line 1 is not printable"),
        (f"\n\n{TOKEN[:15]}", "16 to 512 characters, and line 3 has 15"),
        ("x" * (LONGEST + 1), "16 to 512 characters, and line 1 has 513"),
        ("\n".join(f"{TOKEN}-{number}" for number in range(MOST_TOKENS + 1)), "it holds 1001 tokens, of 1 to 1000"),
    ],
)
def test_a_bad_file_of_tokens_is_named_by_its_line(tmp_path, text, says):
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        read_tokens(str(tmp_path / "tokens"))
    assert "sesame" not in str(refused.value)


def test_tokens_stand_one_a_line_beside_comments(tmp_path):
    (tmp_path / "tokens").write_bytes(f"# of Ann\r\n{TOKEN}\r\n\n  # of Bob\n {TOKEN}#2 ".encode())
    tokens = Tokens(str(tmp_path / "tokens"))
    assert [tokens.know(token) for token in (TOKEN, f"{TOKEN}#2")] == [True, True]
    assert not any(tokens.know(token) for token in ("", "# of Ann", TOKEN[:-1], f"{TOKEN}#", "é", f" {TOKEN}"))
    assert len(read_tokens(str(tmp_path / "tokens"))) == 2


def test_a_changed_file_counts_at_once_and_a_bad_one_does_not(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "tokens"
    path.write_text(TOKEN)
    tokens = Tokens(str(path))
    (tmp_path / "next").write_text(f"{TOKEN}-two")
    (tmp_path / "next").rename(path)
    assert [tokens.know(token) for token in (TOKEN, f"{TOKEN}-two")] == [False, True]
    caplog.clear()
    for damage in (lambda: path.write_text(f"{TOKEN} {TOKEN}"), path.unlink):
        damage()
        assert [tokens.know(f"{TOKEN}-two") for _ in range(3)] == [True] * 3
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in lines] == ["tokens stay as they were"] * 2
    path.write_text(TOKEN)
    assert [tokens.know(token) for token in (TOKEN, f"{TOKEN}-two")] == [True, False]
    assert "sesame" not in caplog.text


def test_files_that_change_while_they_are_read_are_read_again(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("one")
    meanwhile: list[str] = []

    def read() -> str:
        text = path.read_text()
        if meanwhile:
            path.write_text(meanwhile.pop())
        return text

    value = Reloading("words", [str(path)], read)
    path.write_text("a half")
    meanwhile.append("the whole")
    assert value.value() == "one"
    assert value.value() == "the whole"
