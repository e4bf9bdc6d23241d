"""What a client shows of itself and asks of its servers: TLS, certificates, tokens."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from certificates import Authority
from click.testing import CliRunner
from fake_server import FakeServer

from tramontane.client import AsyncClient, Client, ClientOptions, Tls, errors
from tramontane.client.cli import main


def test_the_token_goes_with_every_call(server):
    options = ClientOptions(token="sesame")
    with Client(server.target, options) as client:
        client.generate("a", max_tokens=1)
        client.models()
    asyncio.run(_models(server.target, options))
    assert [seen.metadata.get("authorization") for seen in server.seen] == ["Bearer sesame"] * 3
    assert "sesame" not in repr(options)


async def _models(target: str, options: ClientOptions) -> None:
    async with AsyncClient(target, options) as client:
        await client.models()


@pytest.mark.parametrize("target", ["10.0.0.1:50051", "dns:///tramontane.example:1", "ipv4:127.0.0.1:1,10.0.0.2:1"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_token_does_not_leave_the_machine_in_clear(target, kind):
    with pytest.raises(ValueError, match="in clear"):
        kind(target, ClientOptions(token="sesame"))
    kind(target, ClientOptions(token="sesame", tls=Tls()))
    kind(target, ClientOptions(token="sesame", clear_token=True))


@pytest.mark.parametrize("mutual", [False, True])
async def test_tls(tmp_path, mutual):
    authority = Authority(tmp_path)
    (server_cert, server_key), (cert, key) = authority.issue("server"), authority.issue("client")
    ca = authority.ca
    credentials = grpc.ssl_server_credentials(
        [(server_key.read_bytes(), server_cert.read_bytes())],
        ca.read_bytes() if mutual else None,
        require_client_auth=mutual,
    )
    mine = Tls(ca=ca, cert=cert, key=key) if mutual else Tls(ca=ca)
    with FakeServer(credentials=credentials) as server:
        with Client(server.target, ClientOptions(tls=mine, token="sesame")) as client:
            assert client.generate("ab", max_tokens=2).text == "cd"
        async with AsyncClient(server.target, ClientOptions(tls=mine)) as client:
            assert (await client.generate("ab", max_tokens=2)).text == "cd"
        named = Tls(ca=ca, cert=mine.cert, key=mine.key, server_name="tramontane.test")
        with Client(server.target, ClientOptions(tls=named)) as client:
            assert client.models()
        refused = [None, Tls(), Tls(ca=ca, cert=mine.cert, key=mine.key, server_name="other.test")]
        refused += [Tls(ca=ca)] if mutual else []
        for tls in refused:
            options = ClientOptions(tls=tls, attempts=1)
            with Client(server.target, options) as client, pytest.raises(errors.Unavailable):
                client.models()


def test_the_command_line_says_whom_to_trust(tmp_path):
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    with FakeServer(credentials=credentials) as server:

        def status(*arguments: str) -> int:
            return CliRunner().invoke(main, ["models", "--target", server.target, *arguments]).exit_code

        assert status() == status("--tls") == 1
        assert status("--ca", str(authority.ca)) == 0
        assert status("--ca", str(authority.ca), "--server-name", "tramontane.test") == 0
        assert status("--ca", str(authority.ca), "--server-name", "other.test") == 1


def test_the_command_line_keeps_tokens_at_home_unless_told(server, tmp_path):
    (tmp_path / "token").write_text("sesame\n")
    # Not known to be this machine, though Linux leads it here.
    target = f"0.0.0.0:{server.target.rpartition(':')[2]}"
    arguments = ["models", "--target", target, "--token-file", str(tmp_path / "token")]
    assert CliRunner().invoke(main, arguments).exit_code == 1
    assert not server.seen
    assert CliRunner().invoke(main, [*arguments, "--clear-token"]).exit_code == 0
    assert server.seen[0].metadata["authorization"] == "Bearer sesame"
