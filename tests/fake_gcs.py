"""A fake GCS, which answers the questions that `ray_joining` puts to a Ray."""

from __future__ import annotations

from concurrent import futures
from types import TracebackType
from typing import Self

import grpc
from ray.core.generated import gcs_service_pb2 as pb
from ray.core.generated import gcs_service_pb2_grpc as services
from ray.core.generated.gcs_pb2 import GcsNodeInfo


class FakeGcs(services.NodeInfoGcsServiceServicer, services.InternalKVGcsServiceServicer):
    """A context manager. The server listens on all interfaces, as Ray's does."""

    def __init__(self, *, token: str | None = None, version: str = "", record: bytes = b"", socket: str = "/") -> None:
        """Asks for `token`, claims `version`, holds `record` under every key, and has one node with that socket."""
        self._token = token
        self._version = version
        self._record = record
        self._socket = socket
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        services.add_NodeInfoGcsServiceServicer_to_server(self, self._server)
        services.add_InternalKVGcsServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('0.0.0.0:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()

    def CheckAlive(self, request, context):  # noqa: N802
        self._guard(context)
        return pb.CheckAliveReply(ray_version=self._version)

    def GetAllNodeInfo(self, request, context):  # noqa: N802
        self._guard(context)
        nodes = [GcsNodeInfo(raylet_socket_name=self._socket), GcsNodeInfo(raylet_socket_name="/", state="DEAD")]
        return pb.GetAllNodeInfoReply(node_info_list=nodes)

    def InternalKVGet(self, request, context):  # noqa: N802
        self._guard(context)
        return pb.InternalKVGetReply(value=self._record)

    def _guard(self, context):
        sent = dict(context.invocation_metadata()).get("authorization")
        if self._token is not None and sent != f"Bearer {self._token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
