"""Every cause for which a server cannot be reached, made for real: what both clients say, waiting and not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Iterator

import grpc
import pytest
from certificates import Authority
from click.testing import CliRunner
from fake_server import FakeServer, count_up

from tramontane.client import AsyncClient, Client, ClientOptions, Tls, errors
from tramontane.client.cli import main
from tramontane.client.tls_look import Seen, look


class Places:
    """Servers of all kinds, and what a client needs to talk to them."""

    def __init__(self, folder, stack: contextlib.ExitStack) -> None:
        self.authority, other = Authority(folder), Authority(folder, "other")
        cert, key = self.authority.issue("server")
        self.cert, self.key = self.authority.issue("client")
        self.strange_cert, self.strange_key = other.issue("stranger")
        self.ca, self.other_ca = self.authority.ca, other.ca
        pair = [(key.read_bytes(), cert.read_bytes())]
        mutual = grpc.ssl_server_credentials(pair, self.ca.read_bytes(), require_client_auth=True)
        self.plain = stack.enter_context(FakeServer()).target
        self.tls = stack.enter_context(FakeServer(credentials=grpc.ssl_server_credentials(pair))).target
        self.mutual = stack.enter_context(FakeServer(credentials=mutual)).target
        self.silent = stack.enter_context(listening(None))
        self.closing = stack.enter_context(listening(b""))
        self.http = stack.enter_context(listening(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"))
        self.tls_port = self.tls.rpartition(":")[2]


@contextlib.contextmanager
def listening(says: bytes | None) -> Iterator[str]:
    """A port that accepts connections. It never sends anything, or sends `says` and closes."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        kept = []

        def answer() -> None:
            while True:
                try:
                    connection, _ = door.accept()
                except OSError:
                    return
                if says is None:
                    kept.append(connection)
                    continue
                with connection, contextlib.suppress(OSError):
                    if says:
                        connection.recv(1024)
                        connection.sendall(says)

        threading.Thread(target=answer, daemon=True).start()
        try:
            yield f"127.0.0.1:{door.getsockname()[1]}"
        finally:
            door.shutdown(socket.SHUT_RDWR)
            for connection in kept:
                connection.close()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Iterator[Places]:
    with contextlib.ExitStack() as stack:
        yield Places(tmp_path_factory.mktemp("certificates"), stack)


@pytest.fixture
def hasty(monkeypatch):
    """Make clients give up a connection attempt after 0.3 s instead of 5."""
    whole = ClientOptions.arguments

    def arguments(self, target, *, watch_health):
        return [
            (name, 300 if name == "grpc.min_reconnect_backoff_ms" else value)
            for name, value in whole(self, target, watch_health=watch_health)
        ]

    monkeypatch.setattr(ClientOptions, "arguments", arguments)


HOPELESS = {
    "TLS towards a plain server": (
        *(lambda p: p.plain, lambda p: Tls(ca=p.ca)),
        "{} does not speak TLS; leave tls (--tls, --ca, ...) out if that is meant",
    ),
    "no TLS towards one that speaks it": (
        *(lambda p: p.tls, lambda p: None),
        "{} speaks TLS, and the client does not; give it tls (--tls, or --ca FILE)",
    ),
    "another authority": (
        *(lambda p: p.tls, lambda p: Tls(ca=p.other_ca)),
        "the certificate of {} is not trusted (unable to get local issuer certificate); ca (--ca) names the file of "
        "the authorities to trust",
    ),
    "the usual authorities": (*(lambda p: p.tls, lambda p: Tls()), "the certificate of {} is not trusted ("),
    "another name": (
        *(lambda p: p.tls, lambda p: Tls(ca=p.ca, server_name="other.test")),
        "the certificate of {} is for another name; dial one that it carries, or say which that is by server_name",
    ),
    "no certificate": (
        *(lambda p: p.mutual, lambda p: Tls(ca=p.ca)),
        "{} wants a client certificate; give cert and key (--cert, --key)",
    ),
    "a certificate of a stranger": (
        *(lambda p: p.mutual, lambda p: Tls(ca=p.ca, cert=p.strange_cert, key=p.strange_key)),
        "{} refuses the client's certificate; is it of an authority that the server trusts?",
    ),
    "HTTP/1": (*(lambda p: p.http, lambda p: None), "what answers at {} does not speak gRPC"),
}
PASSING = {
    "nobody": (lambda p: "127.0.0.1:1", "nobody listens at {}: is the server started, and the port right?"),
    "no such host": (lambda p: "no-host.invalid:1", "the host of {} is not known ("),
    "no such socket": (lambda p: "unix:/nonexistent.sock", "{} cannot be reached (No such file or directory)"),
    "silence": (
        lambda p: p.silent,
        "{} takes connections and says nothing: does the server hang, or is it another's port?",
    ),
    "one that closes": (lambda p: p.closing, "{} closes connections before a word: is it a server of Tramontane?"),
}


@pytest.mark.parametrize("case", HOPELESS)
@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "hasty"])
async def test_what_waiting_cannot_change_is_an_error_at_once(places, case, wait):
    target_of, tls_of, says = HOPELESS[case]
    target, options = target_of(places), ClientOptions(tls=tls_of(places), wait=wait, attempts=1)
    await all_say(target, options, says, never="tried for")


@pytest.mark.parametrize("case", PASSING)
async def test_what_may_change_is_waited_for_and_the_error_says_why(places, hasty, case):
    target_of, says = PASSING[case]
    target = target_of(places)
    await all_say(target, ClientOptions(wait=False, attempts=1), says, never="tried for")
    await all_say(target, ClientOptions(reach_timeout_s=0.1), f"{says}|(tried for 0.1 s)", asking=False)


async def all_say(target: str, options: ClientOptions, says: str, *, never: str = "\0", asking: bool = True) -> None:
    """Both clients fail with these words, when they generate and, if `asking`, when they ask."""
    failed: list[errors.Unavailable] = []
    with Client(target, options) as client:
        for call in [lambda: client.generate("a"), client.models, client.health][: 3 if asking else 1]:
            with pytest.raises(errors.Unavailable) as caught:
                await asyncio.to_thread(call)
            failed.append(caught.value)
    async with AsyncClient(target, options) as client:
        for call in [lambda: client.generate("a"), client.models, client.health][: 3 if asking else 1]:
            with pytest.raises(errors.Unavailable) as caught:
                await call()
            failed.append(caught.value)
    for error in failed:
        assert all(part in error.message for part in says.format(target).split("|")), error.message
        assert never not in error.message
        assert error.request_id


def test_a_proxy_that_closes_since_its_server_is_away_is_not_taken_for_one_that_wants_a_certificate(tmp_path):
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("server"))
    context.set_alpn_protocols(["h2"])
    with socket.create_server(("127.0.0.1", 0)) as door:

        def close_all() -> None:
            while True:
                try:
                    connection, _ = door.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError):
                    context.wrap_socket(connection, server_side=True).close()

        threading.Thread(target=close_all, daemon=True).start()
        target = f"127.0.0.1:{door.getsockname()[1]}"
        assert look(target, Tls(ca=authority.ca)) is Seen.NOTHING
        options = ClientOptions(tls=Tls(ca=authority.ca))
        with Client(target, options) as client, pytest.raises(errors.Unavailable) as caught:
            client.models()
        door.shutdown(socket.SHUT_RDWR)
    assert caught.value.message.startswith(f"{target} closes connections after the TLS handshake")


def test_a_socket_without_a_folder_in_its_path_is_looked_at_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert look("server.sock", None) is Seen.NOTHING


def test_a_name_of_several_addresses_tells_which_one_it_is_about(places):
    target = f"localhost:{places.tls_port}"
    with Client(target, ClientOptions(tls=Tls(ca=places.ca))) as client, pytest.raises(errors.Unavailable) as caught:
        client.models()
    # The certificate is for tramontane.test and 127.0.0.1, and nobody listens at ::1.
    assert f"{target} (127.0.0.1:{places.tls_port}) is for another name" in str(caught.value) or (
        f"nobody listens at {target} ([::1]:{places.tls_port})" in str(caught.value)
    )


@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "hasty"])
async def test_a_server_that_does_not_serve_says_why(server, wait):
    server.set_serving(False, "a stage is recovering")
    error_class = errors.DeadlineExceeded if wait else errors.Unavailable
    options = ClientOptions(wait=wait, attempts=1)
    with Client(server.target, options) as client, pytest.raises(error_class) as blocking:
        await asyncio.to_thread(client.generate, "a", timeout_s=1.5)
    async with AsyncClient(server.target, options) as client:
        with pytest.raises(error_class) as awaited:
            await client.generate("a", timeout_s=1.5)
    before = "1.5 s are over: " if wait else ""
    for caught in (blocking, awaited):
        assert caught.value.message == f"{before}{server.target} does not serve (a stage is recovering)"
    assert not server.generated


async def test_what_a_stream_waits_for_can_be_read_and_is_logged_once(server, caplog):
    server.set_serving(False)
    caplog.set_level(logging.INFO, "tramontane.client")
    async with AsyncClient(server.target) as client, client.stream("ab", max_tokens=1) as stream:
        first = asyncio.create_task(anext(stream))
        assert stream.waiting_for == ""
        while not stream.waiting_for:
            await asyncio.sleep(0.05)
        assert stream.waiting_for == f"{server.target} does not serve (loading, 43 %)"
        server.set_serving(True)
        assert (await first).text == "c"
        assert stream.waiting_for == ""
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting: {server.target} does not serve (loading, 43 %)"
    ]


async def test_a_server_that_is_slow_and_serves_is_not_given_up(server):
    """The first token takes longer than a server that cannot be reached is tried."""

    def slow(request, context):
        threading.Event().wait(1.5)
        yield from count_up(request, context)

    server.plans += [slow, slow]
    options = ClientOptions(reach_timeout_s=0.1)
    with Client(server.target, options) as client:
        assert (await asyncio.to_thread(client.generate, "ab", max_tokens=2)).text == "cd"
    async with AsyncClient(server.target, options) as client:
        assert (await client.generate("ab", max_tokens=2)).text == "cd"


def test_the_command_line_says_why_in_one_line(places):
    for case, (target_of, tls_of, says) in HOPELESS.items():
        if case in ("no TLS towards one that speaks it", "HTTP/1"):
            target = target_of(places)
            result = CliRunner().invoke(main, ["generate", "a", "--target", target])
            assert tls_of(places) is None
            assert result.exit_code == 1
            assert result.stderr.startswith(f"Error: {says.format(target)}")
            assert result.stderr.count("\n") == 1
    result = CliRunner().invoke(main, ["models", "--target", "http://127.0.0.1:50051"])
    assert result.stderr == "Error: the target 'http://127.0.0.1:50051' begins with http://; give HOST:PORT alone\n"
