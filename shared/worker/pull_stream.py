"""Pulls on one open stream to kv_transfer, as the worker sees them."""

from __future__ import annotations

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from shared.rpc.call_stream import CallStream, OpenCall


class PullStream(CallStream[pb.PullRequest, pb.PullAsk, pb.PullAnswer, OpenCall[pb.PullReply]]):
    """The worker's end.

    Args:
        stub: Of the worker's own kv_transfer.
    """

    def __init__(self, stub: rpc.KvTransferAsyncStub) -> None:
        super().__init__(stub.Pulls(), pb.PullAsk, OpenCall[pb.PullReply], server="kv_transfer")

    async def pull(self, request: pb.PullRequest) -> pb.PullReply:
        """Asks for blocks. When it returns no transport writes the destination slots any more.

        Cancelled, it has kv_transfer cancel the pull, and does not wait for that: see EndPulls.

        Raises:
            TandemError: kv_transfer refused, or is gone; then the slots may still be written.
        """
        async with self.call(request) as call:
            return await call.reply()
