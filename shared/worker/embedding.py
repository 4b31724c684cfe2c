"""What an embedding call asks of a worker, and its vectors on the wire. Decoders and encoders serve the same call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from protos import worker_pb2 as pb
from shared.errors import ContextLengthExceeded, InvalidRequest, StaleIncarnation
from shared.worker.status import WorkerIdentity

MAX_INPUTS = 1024


def check_embed(request: pb.EmbedRequest, who: WorkerIdentity) -> None:
    """Refuses a call that this worker cannot serve.

    Raises:
        StaleIncarnation: It means an earlier life.
        InvalidRequest: No inputs, too many, an empty one, or token ids outside the vocabulary.
        ContextLengthExceeded: An input is too long.
    """
    if request.incarnation != who.incarnation:
        raise StaleIncarnation(f"worker {who.worker_id}: the call meant {request.incarnation}")
    if not 1 <= len(request.inputs) <= MAX_INPUTS:
        raise InvalidRequest(f"{len(request.inputs)} inputs, must be 1 to {MAX_INPUTS} in a call", param="input")
    for item in request.inputs:
        token_ids = item.token_ids
        if not token_ids:
            raise InvalidRequest("an input has no tokens", param="input")
        if len(token_ids) > who.max_model_len:
            raise ContextLengthExceeded(
                f"an input has {len(token_ids)} tokens, the context length is {who.max_model_len}", param="input"
            )
        if min(token_ids) < 0 or max(token_ids) >= who.vocab_size:
            raise InvalidRequest(f"a token id is outside the vocabulary [0, {who.vocab_size})", param="input")


def embed_reply(vectors: Sequence[npt.NDArray[np.float64]], request: pb.EmbedRequest) -> pb.EmbedReply:
    """Cuts and normalizes as the request wants.

    Args:
        vectors: One per input, float64 `[hidden]`.
        request: Says `dimensions` and `normalize`.
    """
    stacked = np.stack(vectors)[:, : request.dimensions or None]
    if request.normalize:
        stacked = stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)
    return pb.EmbedReply(size=stacked.shape[1], vectors=stacked.astype("<f4").tobytes())
