"""Why a Ray cannot be joined is said in one line, before anything tries to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import msgpack
import pytest
import ray
from fake_gcs import FakeGcs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tramontane.cluster import ray_joining
from tramontane.cluster.ray_joining import (
    AuthenticationTokenLoader,
    NoRay,
    joinable_address,
    own_token,
    served_identity,
)

TRAMONTANE = str(Path(sys.executable).with_name("tramontane"))


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """Sets the mode and the token that Ray's client finds in this process."""

    def set_them(mode: str, token: str | None = None) -> None:
        modes = ray_joining.AuthenticationMode
        monkeypatch.setattr(
            ray_joining, "get_authentication_mode", lambda: modes.TOKEN if mode == "token" else modes.DISABLED
        )
        if token is not None:
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        AuthenticationTokenLoader.instance().reset_cache()

    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield set_them
    monkeypatch.undo()
    AuthenticationTokenLoader.instance().reset_cache()


def cluster(token: str | None = None, version: str = ray.__version__) -> FakeGcs:
    return FakeGcs(token=token, version=version)


@pytest.mark.parametrize(("asked", "mode", "token"), [(None, "disabled", None), ("right", "token", "right")])
def test_a_ray_that_agrees_is_joined(ours, asked, mode, token):
    ours(mode, token)
    with cluster(asked) as gcs:
        assert joinable_address(gcs.address) == gcs.address


@pytest.mark.parametrize(
    ("asked", "mode", "token", "said"),
    [
        (None, "token", None, "asks for no token, so whoever reaches it runs programs there: `ray get-auth-token"),
        (None, "token", "mine", "RAY_AUTH_MODE=disabled joins it as it is"),
        ("right", "disabled", "right", "asks for a token, and RAY_AUTH_MODE is disabled here: set it to token"),
        ("right", "token", None, "asks for a token, and there is none here: its own comes from RAY_AUTH_TOKEN, the"),
        ("right", "token", "wrong", "has another token than RAY_AUTH_TOKEN"),
        ("right", "token", "no\x01ne", "asks for a token, and that of RAY_AUTH_TOKEN is no printable ASCII text"),
    ],
)
def test_one_that_does_not_is_told_with_what_both_sides_need(ours, asked, mode, token, said):
    ours(mode, token)
    with cluster(asked) as gcs, pytest.raises(ConnectionError) as caught:
        joinable_address(gcs.address)
    assert str(caught.value).startswith(f"the Ray at {gcs.address} ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_another_version_of_ray_is_not_joined(ours):
    ours("disabled")
    with cluster(version="2.9.3") as gcs, pytest.raises(ConnectionError, match=r"is version 2\.9\.3, and here it is "):
        joinable_address(gcs.address)


def test_a_ray_without_a_node_on_this_machine_is_not_joined(ours, tmp_path, monkeypatch):
    ours("disabled")
    monkeypatch.setattr(ray_joining, "NODE_TIMEOUT_S", 0.0)
    with FakeGcs(version=ray.__version__, socket=str(tmp_path / "raylet")) as gcs:
        with pytest.raises(
            ConnectionError, match=f"^no node of the Ray at {gcs.address} runs on this machine: `ray st"
        ):
            joinable_address(gcs.address)
        # A node that is only starting is waited for.
        monkeypatch.setattr(ray_joining, "NODE_TIMEOUT_S", 60.0)
        monkeypatch.setattr(ray_joining.time, "sleep", lambda _: (tmp_path / "raylet").touch())
        assert joinable_address(gcs.address) == gcs.address


def test_nobody_and_others_who_listen_are_no_ray(ours, monkeypatch):
    ours("disabled")
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(NoRay, match=f"^no Ray cluster at {address}: Connection refused$"):
            joinable_address(address)
        listener.listen()
        monkeypatch.setattr(ray_joining, "REACH_TIMEOUT_S", 0.2)
        with pytest.raises(ConnectionError, match=f"^no Ray cluster at {address}: what listens there has not answered"):
            joinable_address(address)
    server = grpc.server(None)
    address = f"127.0.0.1:{server.add_insecure_port('0.0.0.0:0')}"
    server.start()
    with pytest.raises(NoRay, match=f"^no Ray cluster at {address}: what listens there is no Ray's GCS$"):
        joinable_address(address)
    server.stop(None)
    with pytest.raises(ConnectionError, match=r"^no Ray cluster at no\.such\.host\.invalid:6379: "):
        joinable_address("no.such.host.invalid:6379")


@pytest.mark.parametrize("address", ["", "local", "ray://127.0.0.1:10001", "127.0.0.1", ":6379", "127.0.0.1:65536"])
@pytest.mark.parametrize("how", ["given", "RAY_ADDRESS"])
def test_what_is_no_address_is_said(ours, monkeypatch, address, how):
    ours("disabled")
    if how == "RAY_ADDRESS" and address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=r"^address is .*; it takes HOST:PORT, where a Ray's GCS listens, or auto$"):
        joinable_address("auto" if how == "RAY_ADDRESS" and address else address)


def test_the_service_of_a_ray_is_known_without_joining_it(ours):
    ours("token", "right")
    record = msgpack.packb({"identity": "5e", "name": "m", "of a later version": 1})
    with FakeGcs(token="right", record=record) as gcs:
        assert served_identity(gcs.address) == "5e"
    with FakeGcs() as gcs:
        assert served_identity(gcs.address) is None
    with FakeGcs(token="another") as gcs, pytest.raises(ConnectionError, match="has another token than RAY_AUTH_TOKEN"):
        served_identity(gcs.address)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=64))
def test_no_bytes_of_a_token_file_are_more_than_a_line(ours, tmp_path, monkeypatch, written):
    (tmp_path / "token").write_bytes(written)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    ours("token")
    said = token = ""
    try:
        token = own_token("h:1")
    except ConnectionError as error:
        said = str(error)
    assert said.isprintable()
    assert bool(token) != said.startswith("the Ray at h:1 asks for a token, and ")
    assert token.encode() in written


def test_the_command_line_says_it_quickly_and_without_a_traceback(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with cluster("right") as gcs:
        done = subprocess.run(
            [TRAMONTANE, "down", "--address", gcs.address],
            env=environment | {"RAY_AUTH_TOKEN": "wrong"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: the Ray at {gcs.address} has another token than RAY_AUTH_TOKEN\n"
