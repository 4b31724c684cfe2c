"""The first command of a gateway's `Generate` stream."""

from __future__ import annotations

from protos import worker_pb2 as pb
from shared.errors import FingerprintMismatch, InvalidRequest, StaleIncarnation
from shared.worker.status import WorkerIdentity


def check_hello(command: pb.GenerateCommand, who: WorkerIdentity) -> str:
    """Checks that the gateway means this life of this worker; returns the gateway's id.

    Raises:
        InvalidRequest: The first command is not a Hello.
        StaleIncarnation: It means an earlier life.
        FingerprintMismatch: It means another model or layout.
    """
    if command.WhichOneof("command") != "hello":
        raise InvalidRequest("the first command of a Generate stream must be hello")
    if command.hello.incarnation != who.incarnation:
        raise StaleIncarnation(f"worker {who.worker_id}: the call meant {command.hello.incarnation}")
    if command.hello.fingerprint != who.fingerprint:
        raise FingerprintMismatch(f"worker {who.worker_id} serves {who.fingerprint}")
    return command.hello.gateway_id
