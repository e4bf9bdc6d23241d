"""TLS, client certificates and bearer tokens at a real gateway, with our own clients and with bare gRPC."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from calls import SERVING, Code, ask, failure, health_of, stub_of
from certificates import Authority
from fake_pipeline import FakePipeline, serving
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tramontane.client import AsyncClient, Client, ClientOptions, HealthStatus, Tls, Unauthenticated, Unavailable
from tramontane.cluster.entrance import Entrance
from tramontane.protos import serving_pb2 as pb

TOKENS = ("sesame-of-ann-0001", "sesame-of-bob-0002")


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def encrypted(authority, tmp_path) -> Entrance:
    """A gateway's certificate and key in files of its own, which tests may replace."""
    for source, name in zip(authority.issue("server"), ("cert", "key"), strict=True):
        (tmp_path / name).write_bytes(source.read_bytes())
    return Entrance(tls_cert=str(tmp_path / "cert"), tls_key=str(tmp_path / "key"))


@pytest.fixture
def guarded(tmp_path) -> Entrance:
    (tmp_path / "tokens").write_text("\n".join(TOKENS))
    return Entrance(token_file=str(tmp_path / "tokens"))


async def served_by(target: str, options: ClientOptions) -> tuple[int, int]:
    """Tokens that both clients get there."""

    def blocking() -> int:
        with Client(target, options) as client:
            return len(client.generate("a summer", max_tokens=3).token_ids)

    async with AsyncClient(target, options) as client:
        whole = await client.generate("a summer", max_tokens=3)
    return len(whole.token_ids), await asyncio.to_thread(blocking)


async def shown_certificate(target: str) -> str:
    """What the server shows to a new connection, in PEM."""
    host, _, port = target.rpartition(":")
    return await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))


def same(one: str, other: bytes) -> bool:
    return one.split() == other.decode().split()


class File:
    """A file of a gateway's, as an operator changes it."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    @property
    def content(self) -> bytes:
        return self._path.read_bytes()

    @content.setter
    def content(self, content: bytes) -> None:
        self._path.write_bytes(content)

    def remove(self) -> None:
        self._path.unlink()


async def test_tls_serves_who_trusts_the_authority(authority, encrypted):
    async with serving(entrance=encrypted) as (_, target):
        assert await served_by(target, ClientOptions(tls=Tls(ca=authority.ca))) == (3, 3)
        for tls in (None, Tls(), Tls(ca=authority.ca, server_name="other.test")):
            async with AsyncClient(target, ClientOptions(tls=tls, attempts=1)) as client:
                with pytest.raises(Unavailable):
                    await client.models()


async def test_with_a_client_ca_clients_prove_themselves(authority, encrypted, tmp_path_factory):
    stranger = Authority(tmp_path_factory.mktemp("stranger"), "stranger")
    cert, key = authority.issue("client")
    entrance = Entrance(tls_cert=encrypted.tls_cert, tls_key=encrypted.tls_key, client_ca=str(authority.ca))
    async with serving(entrance=entrance) as (_, target):
        assert await served_by(target, ClientOptions(tls=Tls(ca=authority.ca, cert=cert, key=key))) == (3, 3)
        their_cert, their_key = stranger.issue("client")
        for tls in (Tls(ca=authority.ca), Tls(ca=authority.ca, cert=their_cert, key=their_key)):
            async with AsyncClient(target, ClientOptions(tls=tls, attempts=1)) as client:
                with pytest.raises(Unavailable):
                    await client.models()


async def test_a_renewed_certificate_is_taken_up_and_a_bad_one_is_not(authority, encrypted, caplog):
    cert, key = File(encrypted.tls_cert), File(encrypted.tls_key)
    old = cert.content
    options = ClientOptions(tls=Tls(ca=authority.ca))
    async with serving(entrance=encrypted) as (_, target), AsyncClient(target, options) as early:
        await early.generate("a", max_tokens=1)
        assert same(await shown_certificate(target), old)
        new_cert, new_key = authority.issue("renewed")
        cert.content = new_cert.read_bytes()  # renewed in two steps; the pair does not match in between
        assert same(await shown_certificate(target), old)
        assert "certificates stay as they were: --tls-key is" in caplog.text
        key.content = new_key.read_bytes()
        assert same(await shown_certificate(target), new_cert.read_bytes())
        key.remove()
        assert same(await shown_certificate(target), new_cert.read_bytes())
        await early.generate("a", max_tokens=1)
        assert await served_by(target, options) == (3, 3)


async def test_an_expired_certificate_is_warned_of_when_it_is_taken_up(authority, encrypted, caplog):
    cert, key = File(encrypted.tls_cert), File(encrypted.tls_key)
    async with serving(entrance=encrypted) as (_, target):
        assert "expired" not in caplog.text
        expired, expired_key = authority.issue("expired", days=-1)
        cert.content, key.content = expired.read_bytes(), expired_key.read_bytes()
        assert same(await shown_certificate(target), expired.read_bytes())
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.partition(" expired on ")[0] for line in lines] == [
        f"--tls-cert is {encrypted.tls_cert}, in which certificate 1 of 1"
    ]


async def test_files_that_have_gone_since_serve_looked_are_an_error_of_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"--tls-cert is .*, which cannot be read"):
        async with serving(entrance=Entrance(tls_cert=str(tmp_path / "cert"), tls_key=str(tmp_path / "key"))):
            pass


# Tokens


async def refused(target: str, options: ClientOptions) -> str:
    async with AsyncClient(target, options) as client:
        with pytest.raises(Unauthenticated) as error:
            await client.generate("a summer", max_tokens=3)
    return error.value.message


async def test_each_token_of_the_file_is_let_in_and_nobody_else(guarded):
    pipeline = FakePipeline()
    async with serving(pipeline, entrance=guarded) as (_, target):
        for token in TOKENS:
            assert await served_by(target, ClientOptions(token=token)) == (3, 3)
        pipeline.submitted.clear()
        assert "a bearer token is missing" in await refused(target, ClientOptions())
        assert "not known" in await refused(target, ClientOptions(token=TOKENS[0][:-1]))
        assert not pipeline.submitted


async def test_a_token_may_come_and_go_while_the_gateway_runs(guarded):
    new = "sesame-of-cyd-0003"
    file = File(guarded.token_file)
    async with serving(entrance=guarded) as (_, target):
        file.content = f"{TOKENS[0]}\n{new}\n".encode()
        for token in (TOKENS[0], new):
            assert await served_by(target, ClientOptions(token=token)) == (3, 3)
        assert "not known" in await refused(target, ClientOptions(token=TOKENS[1]))
        file.remove()
        assert await served_by(target, ClientOptions(token=new)) == (3, 3)


async def listed_services(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> int:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    answers = [answer async for answer in stub.ServerReflectionInfo(requests, metadata=metadata)]
    return len(answers[0].list_services_response.service)


async def stream_first(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> object:
    method = channel.unary_stream("/tramontane.v1.Serving/GenerateStream", pb.GenerateRequest.SerializeToString)
    return await method(ask(), metadata=metadata).read()


def unary(name: str, request: bytes = b"") -> Callable:
    async def call(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> object:
        return await channel.unary_unary(f"/tramontane.v1.Serving/{name}")(request, metadata=metadata)

    return call


CALLS = {
    **{name: unary(name) for name in ("ListModels", "GetStats", "Tokenize", "Detokenize")},
    "Generate": unary("Generate", ask().SerializeToString()),
    "GenerateStream": stream_first,
    "reflection": listed_services,
}


@pytest.mark.parametrize("name", CALLS)
async def test_every_call_needs_one(guarded, name):
    async with serving(entrance=guarded) as (_, target), grpc.aio.insecure_channel(target) as channel:
        assert await CALLS[name](channel, (("authorization", f"Bearer {TOKENS[1]}"),)) is not None
        for value in ("", TOKENS[1], f"Basic {TOKENS[1]}", "Bearer", f"Bearer {TOKENS[0]} {TOKENS[1]}"):
            error = await failure(CALLS[name](channel, (("authorization", value),)))
            assert error.code() == Code.UNAUTHENTICATED
        assert (await failure(CALLS[name](channel, ()))).code() == Code.UNAUTHENTICATED


async def test_a_method_that_is_not_there_is_not_told_to_strangers(guarded):
    async with serving(entrance=guarded) as (_, target), grpc.aio.insecure_channel(target) as channel:
        assert (await failure(unary("Generat")(channel, ()))).code() == Code.UNAUTHENTICATED
        known = (("authorization", f"bearer {TOKENS[0]}"),)
        assert (await failure(unary("Generat")(channel, known))).code() == Code.UNIMPLEMENTED


async def test_health_is_open(guarded):
    async with serving(entrance=guarded) as (gateway, target), grpc.aio.insecure_channel(target) as channel:
        assert await health_of(target, "tramontane.v1.Serving/tiny") == SERVING
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        gateway.set_unavailable("recovery failed")
        assert (await watch.read()).status != SERVING
        async with AsyncClient(target) as client:
            assert await client.health() is HealthStatus.NOT_SERVING


async def test_health_names_no_model_to_strangers(guarded):
    async with serving(entrance=guarded) as (_, target), grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        listed = await stub.List(health_pb2.HealthListRequest())
        assert set(listed.statuses) == {"", "tramontane.v1.Serving"}
        error = await failure(stub.Check(health_pb2.HealthCheckRequest(service="other")))
        assert "tiny" not in error.details()


async def test_no_token_is_ever_logged(guarded, caplog):
    caplog.set_level(logging.DEBUG)
    async with serving(entrance=guarded) as (_, target), stub_of(target) as stub:
        for token in (*TOKENS, "sesame-of-a-stranger"):
            metadata = (("authorization", f"Bearer {token}"),)
            call = stub.Generate(ask(), metadata=metadata)
            await (failure(call) if token not in TOKENS else call)
        File(guarded.token_file).content = b"sesame of a fool"
        await stub.Generate(ask(), metadata=(("authorization", f"Bearer {TOKENS[0]}"),))
    assert "UNAUTHENTICATED, the bearer token is not known here" in caplog.text
    assert "tokens stay as they were" in caplog.text
    assert "sesame" not in caplog.text
