"""Serves `Worker.Embed`: inputs become sequences of the same engine, which end in a vector instead of text."""

from __future__ import annotations

import asyncio

from protos import worker_pb2 as pb
from shared.engine.sequence import FinishReason, Pooling, Sequence
from shared.engine.step import StepOutputs
from shared.errors import InvalidRequest, Unavailable, WorkerLost
from shared.identity import SequenceId, SessionId, namespace_hash
from shared.worker.embedding import check_embed, embed_reply
from shared.worker.process import WorkerParts

_POOLINGS = {pb.POOLING_LAST: Pooling.LAST, pb.POOLING_MEAN: Pooling.MEAN}


class Embedder:
    """One for the process, on its event loop."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._waiting: dict[SequenceId, asyncio.Future[Sequence]] = {}
        parts.dispatch.add_listener(self._on_step)

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedReply:
        """Vectors of all inputs; a cancelled call aborts its sequences.

        Raises:
            InvalidRequest: An input cannot be served.
            Overloaded: The engine's queue is full.
            WorkerLost: The engine stopped.
        """
        parts = self._parts
        check_embed(request, parts.status.identity)
        if parts.status.is_draining:
            raise Unavailable(f"worker {parts.status.identity.worker_id} is draining")
        sequences = self._sequences(request)
        loop = asyncio.get_running_loop()
        futures = {sequence.sequence_id: loop.create_future() for sequence in sequences}
        self._waiting |= futures
        try:
            parts.engine.submit(sequences)
            ended: list[Sequence] = await asyncio.gather(*futures.values())
        finally:
            for sequence_id in futures:
                self._waiting.pop(sequence_id, None)
            parts.engine.abort(futures)
        if any(sequence.finish_reason is not FinishReason.POOLED for sequence in ended):
            raise WorkerLost(f"worker {parts.status.identity.worker_id} stopped")
        return embed_reply([s.pooled / s.num_pooled_tokens for s in ended if s.pooled is not None], request)

    def _sequences(self, request: pb.EmbedRequest) -> list[Sequence]:
        pooling = _POOLINGS.get(request.pooling)
        if pooling is None:
            raise InvalidRequest(f"a decoder pools the last token or the mean, not {pb.Pooling.Name(request.pooling)}")
        namespace = namespace_hash(self._parts.status.identity.fingerprint, request.cache_salt)
        return [
            Sequence(
                session_id=SessionId(f"{request.session_id}/{index}"),
                token_ids=list(item.token_ids),
                num_prompt_tokens=len(item.token_ids),
                sampling=None,
                namespace=namespace,
                priority=request.priority,
                pooling=pooling,
            )
            for index, item in enumerate(request.inputs)
        ]

    def _on_step(self, outputs: StepOutputs) -> None:
        for sequence in outputs.finished:
            future = self._waiting.pop(sequence.sequence_id, None)
            if future is not None and not future.done():
                future.set_result(sequence)
