"""How much KV memory the choices of one prompt save by sharing blocks, as in the PagedAttention paper, section 6.3.

    python -m loadtest.engine.sharing_bench

Saved = (blocks if every choice had its own - blocks held) / (blocks if every choice had its own), averaged over steps.
For sampling the blocks held are what the block pool says; for beams they follow from which prefixes are equal, because
equal full blocks are one block by construction and a beam's last block is its own.

Measured (2026-11-23, pydoc-mini, blocks of 16 tokens; counts of blocks, so the machine does not matter), 2, 4, 6 wide:

    19 tokens in, 58 out     samples 14 %, 23 %, 25 %     beams 26 %, 46 %, 51 %
    161 tokens in, 338 out   samples 26 %, 39 %, 43 %     beams 44 % (2)
"""

from __future__ import annotations

import queue
import random
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from services.decode.beams import BeamSearch
from shared.engine.engine import Engine
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import StepOutputs
from shared.identity import BlockHash, SessionId
from shared.models.resolve import resolve_model
from shared.tokenization.tokenizer import Tokenizer
from shared.worker.loading import load_engine
from shared.worker.settings import WorkerSettings

WORKLOADS = {"short (19 in, 58 out)": (19, 58), "long (161 in, 338 out)": (161, 338)}
"""Mean lengths of the paper's two data sets, Alpaca and ShareGPT."""
WIDTHS = (2, 4, 6)
PROMPTS = 6


def blocks_of(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // block_size)


def sampled(engine: Engine, outputs: queue.SimpleQueue[StepOutputs], prompt: list[int], n: int, length: int,
            block_size: int) -> Iterator[float]:  # fmt: skip
    """Saved share after each step of `n` samples."""
    params = SamplingParams(max_tokens=length, temperature=1.0, seed=len(prompt), ignore_eos=True)
    namespace = BlockHash(random.randbytes(16))
    sequences = [
        Sequence(SessionId("share"), list(prompt), len(prompt), params, namespace, choice=choice) for choice in range(n)
    ]
    engine.submit(sequences)
    num_finished = 0
    while num_finished < n:
        step = outputs.get()
        num_finished += len(step.finished)
        used = engine.stats().blocks.used
        alone = sum(blocks_of(s.num_computed_tokens, block_size) for s in sequences if not s.is_finished)
        if alone and all(s.num_output_tokens for s in sequences):
            yield 1 - used / alone


def searched(engine: Engine, outputs: queue.SimpleQueue[StepOutputs], prompt: list[int], width: int, length: int,
             block_size: int) -> Iterator[float]:  # fmt: skip
    """Saved share in each step of a search with `width` beams."""
    params = SamplingParams(max_tokens=length, beam_width=width, temperature=0.0, num_logprobs=2 * width)
    search, namespace = BeamSearch(params, frozenset()), BlockHash(random.randbytes(16))
    while not search.is_over:
        sequences = [
            Sequence(
                SessionId("beams"),
                [*prompt, *beam.token_ids],
                len(prompt),
                replace(params, max_tokens=len(beam.token_ids) + 1),
                namespace,
                choice=number,
            )
            for number, beam in enumerate(search.beams)
        ]
        if len(sequences) == width:
            tokens = [tuple(sequence.token_ids) for sequence in sequences]
            full = {t[: i + block_size] for t in tokens for i in range(0, len(t) - block_size + 1, block_size)}
            own = sum(1 for t in tokens if len(t) % block_size)
            yield 1 - (len(full) + own) / sum(blocks_of(len(t), block_size) for t in tokens)
        engine.submit(sequences)
        found = {}
        while len(found) < len(sequences):
            found |= {sequence.sequence_id: logprobs for sequence, _, logprobs in outputs.get().tokens}
        search.advance([top for s in sequences if (top := found[s.sequence_id]) is not None])


def main() -> None:
    """Entry point."""
    scratch = Path(tempfile.mkdtemp(prefix="tandem-sharing-"))
    settings = WorkerSettings(
        model="pydoc-mini",
        worker_id=f"sharing-{scratch.name[-8:]}",
        transfer_socket=scratch / "none",
        run_dir=scratch,
        kv_cache_bytes=256 << 20,
        threads=1,
        log_level="error",
    )
    outputs: queue.SimpleQueue[StepOutputs] = queue.SimpleQueue()
    loaded = load_engine(settings, "decode", outputs.put, lambda request: None)
    loaded.arena.unlink()
    engine, block_size = loaded.engine, settings.block_size
    engine.start()
    tokenizer = Tokenizer.from_pretrained(resolve_model("pydoc-mini", with_weights=False))
    text = Path(__file__).read_text() * 4
    ids = tokenizer.encode(text, add_special_tokens=False)
    rng = random.Random(0)
    for name, (prompt_len, length) in WORKLOADS.items():
        starts = [rng.randrange(len(ids) - prompt_len) for _ in range(PROMPTS)]
        for label, how in (("samples", sampled), ("beams", searched)):
            for width in WIDTHS:
                saved = [
                    share
                    for start in starts
                    for share in how(engine, outputs, ids[start : start + prompt_len], width, length, block_size)
                ]
                print(f"{name:24} {width} {label:8} {100 * statistics.mean(saved):5.1f} % of KV memory saved")
    engine.stop()


if __name__ == "__main__":
    main()
