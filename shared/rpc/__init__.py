"""How Tandem's processes speak gRPC: one kind of channel, one kind of server, one mapping of errors.

Asyncio (`grpc.aio`) only.

    async with open_channel("127.0.0.1:7001") as channel:
        with rpc_errors():                       # AioRpcError -> TandemError
            reply = await WorkerStub(channel).Status(StatusRequest())

    server = new_server()                        # a TandemError raised by a servicer reaches the caller as itself
    add_WorkerServicer_to_server(servicer, server)
    address = bind_tcp(server, "127.0.0.1", 0)
    await server.start()
"""

from shared.rpc.channel import open_channel, unix_target
from shared.rpc.channel_pool import ChannelPool
from shared.rpc.server import bind_tcp, bind_unix, new_server
from shared.rpc.status import abort_with, error_from_rpc, rpc_errors
from shared.rpc.tls import PeerRole, TlsFiles

__all__ = [
    "ChannelPool",
    "PeerRole",
    "TlsFiles",
    "abort_with",
    "bind_tcp",
    "bind_unix",
    "error_from_rpc",
    "new_server",
    "open_channel",
    "rpc_errors",
    "unix_target",
]
