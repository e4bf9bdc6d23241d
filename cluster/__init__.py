"""Who does what, where, in what order: router, gateway, controller and the worker around a stage, as Ray actors."""

import os

# gRPC reads it when it is imported. Else its core prints a line for each TLS handshake that fails, as often as any
# stranger likes, and Ray keeps what a process prints.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
