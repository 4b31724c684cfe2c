"""A holder cannot send its peers to other hosts: F28."""

import pytest

from protos import kv_transfer_pb2 as pb
from services.kv_transfer.pull import _data_host
from shared.directory.records import TransferRecord
from shared.errors import InternalError
from shared.identity import Fingerprint, Incarnation, WorkerId

HOLDER = TransferRecord(WorkerId("w"), Incarnation("i"), Fingerprint("f"), "10.0.0.7:9000", 0, 1)


@pytest.mark.parametrize("said", ["", "10.0.0.7"])
def test_bytes_come_from_the_host_that_the_directory_names(said):
    assert _data_host(pb.FetchReply(ucx_host=said), HOLDER) == "10.0.0.7"


@pytest.mark.parametrize("said", ["10.0.0.8", "169.254.169.254", "metadata.internal", "[::1]"])
def test_another_host_is_refused(said):
    with pytest.raises(InternalError, match="points to"):
        _data_host(pb.FetchReply(ucx_host=said), HOLDER)


def test_no_message_between_gateway_and_workers_carries_an_address():
    from protos import worker_pb2

    words = ("host", "addr", "port", "url", "uri", "socket", "path", "endpoint")
    for name, message in worker_pb2.DESCRIPTOR.message_types_by_name.items():
        for field in message.fields:
            parts = field.name.split("_")
            assert not any(part.startswith(word) for part in parts for word in words), f"{name}.{field.name}"
