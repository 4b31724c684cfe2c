"""Pulls on one open stream to kv_transfer, as the worker sees them."""

from __future__ import annotations

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.rpc.call_stream import CallStream, OpenCall


class PullStream:
    """The worker's end of one stream, opened at once; whoever made it closes it, before its channel.

    Args:
        stub: Of the worker's own kv_transfer.
    """

    def __init__(self, stub: rpc.KvTransferAsyncStub) -> None:
        self._calls = CallStream(stub.Pulls(), pb.PullAsk, OpenCall[pb.PullReply], server="kv_transfer")

    async def pull(self, request: pb.PullRequest) -> pb.PullReply:
        """Asks for blocks. When it returns no transport writes the destination slots any more.

        Cancelled, it has kv_transfer cancel the pull, and does not wait for that: see EndPulls.

        Raises:
            TandemError: kv_transfer refused, or is gone; then the slots may still be written.
        """
        async with self._calls.call(request) as call:
            return await call.reply()

    def retire(self) -> None:
        """No more pulls come; ends after the last one."""
        self._calls.retire()

    def close(self) -> None:
        """Ends the stream, and every pull on it."""
        self._calls.close()
