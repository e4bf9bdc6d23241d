"""A model's folder that changes while it is served: what was loaded is what is served."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from service import Service, eventually

from tramontane.client import Client, ClientOptions, HealthStatus, StatusError
from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.config import ModelConfig

pytestmark = pytest.mark.ray

OPTIONS = ("--stages", "1", "--dtype", "float32")
"""Stages aside those of the shared service, which serves the same bytes from another folder."""


@pytest.fixture
def folder(embedded_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(embedded_dir, tmp_path / "model")


def put_other_tokenizer(folder: Path) -> None:
    """One of the same size, in which every piece prints what another one did."""
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    normal = [piece for piece in model.pieces if piece.type == ModelProto.SentencePiece.NORMAL]
    for piece, text in zip(normal, reversed([piece.piece for piece in normal]), strict=True):
        piece.piece = text
    other = folder / "other"
    other.write_bytes(model.SerializeToString())
    other.rename(folder / "tokenizer.model")


def pid_of(client: Client, role: str) -> int:
    return next(process.pid for process in client.stats().processes if process.role == role)


def kill_controller(client: Client) -> None:
    """And wait until Ray has started it again and it has found all parts."""
    dead = pid_of(client, "controller")
    os.kill(dead, signal.SIGKILL)

    def answers() -> bool:
        try:
            processes = client.stats().processes
        except StatusError:
            return False
        return len(processes) == 4 and dead not in {process.pid for process in processes}

    eventually(answers, 60)


def flip_in_the_middle(folder: Path, name: str) -> None:
    """One bit of a tensor, far from its first and last bytes."""
    tensor = Checkpoint.open(folder, ModelConfig.load(folder)).tensors[name]
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.start + tensor.size // 2)
        (byte,) = stream.read(1)
        stream.seek(tensor.start + tensor.size // 2)
        stream.write(bytes([byte ^ 1]))


def version_of(service: Service) -> str:
    with Client(service.target) as client:
        return client.models()[0].version


def test_a_bit_in_the_middle_of_a_tensor_makes_another_version(folder: Path, service: Service) -> None:
    flip_in_the_middle(folder, "model.embed_tokens.weight")
    other = Service(str(folder), *OPTIONS)
    try:
        assert version_of(other) != version_of(service)
    finally:
        assert other.end() == 0, other.output


def test_what_was_loaded_is_served_whatever_becomes_of_the_folder(
    folder: Path, service: Service, tmp_path: Path
) -> None:
    running = Service(str(folder), *OPTIONS)
    try:
        with Client(running.target, ClientOptions(wait=False)) as client:

            def served() -> tuple[str, str, HealthStatus]:
                completion = client.generate("ROMEO:\n", max_tokens=24, temperature=0, ignore_eos=True)
                return completion.text, client.models()[0].version, client.health()

            before = served()
            assert before[1:] == (version_of(service), HealthStatus.SERVING)
            put_other_tokenizer(folder)
            kill_controller(client)
            assert served() == before

            aside = folder.rename(tmp_path / "aside")
            kill_controller(client)
            assert served() == before

            # A gateway that starts now would find the other tokenizer.
            aside.rename(folder)
            controller, gateway = pid_of(client, "controller"), pid_of(client, "gateway")
            os.kill(controller, signal.SIGSTOP)  # or it would see the gateway's end
            os.kill(gateway, signal.SIGKILL)
            eventually(lambda: not psutil.pid_exists(gateway))
            os.kill(controller, signal.SIGKILL)
        said = running.wait_for(r"^not serving: .*")[0]
        assert "gateway-0 on node " in said
        assert f"does not join: {folder}/tokenizer.model: not the file that the service has loaded" in said
    finally:
        assert running.end() == 1, running.output
