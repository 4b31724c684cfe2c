"""How much KV memory the choices of one prompt save by sharing blocks, as in the PagedAttention paper, section 6.3.

    python -m loadtest.engine.sharing_bench

Saved = (blocks without sharing - blocks held) / (blocks without sharing), at the end of each step and averaged over
steps. Blocks held are what the pool counts, blocks without sharing what the choices' tokens would fill one by one. For
beams, tokens computed in chunks say whether anything but the prompts was computed again.

Measured (2026-11-28, pydoc-mini, blocks of 16 tokens; counts of blocks, so the machine does not matter), 2, 4, 6 wide:

    19 tokens in, 58 out     samples 15.9 %, 24.2 %, 27.0 %     beams 29.5 %, 44.4 %, 48.6 %
    161 tokens in, 338 out   samples 26.0 %, 39.1 %, 43.5 %     beams 41.0 %, 64.0 %, 72.1 %

and no token was computed in chunks but each prompt's, once. The paper has, on Alpaca and ShareGPT, samples 6.1 to 9.8 %
and 16.2 to 30.5 %, beams 37.6 to 55.2 % and 44.3 to 66.3 %.
"""

from __future__ import annotations

import queue
import random
import statistics
import tempfile
from dataclasses import dataclass, field, replace
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


@dataclass(slots=True)
class Meter:
    """Looks at the pool after each step, before the next can begin.

    Attributes:
        engine: Set once it is loaded.
        block_size: Tokens.
        sequences: All that hold blocks.
        saved: Share of blocks saved, per step in which all of them have an output.
        outputs: What the steps brought.
    """

    engine: Engine | None = None
    block_size: int = 16
    sequences: list[Sequence] = field(default_factory=list)
    saved: list[float] = field(default_factory=list)
    outputs: queue.SimpleQueue[StepOutputs] = field(default_factory=queue.SimpleQueue)

    def on_step(self, outputs: StepOutputs) -> None:
        """For the engine; in its thread."""
        assert self.engine is not None, "no step before the engine is loaded"
        holders = [s for s in self.sequences if s.block_table]
        if outputs.tokens and holders and all(s.num_output_tokens for s in self.sequences):
            alone = sum(-(-s.num_computed_tokens // self.block_size) for s in holders)
            self.saved.append(1 - self.engine.stats().blocks.used / alone)
        self.outputs.put(outputs)


def sampled(meter: Meter, engine: Engine, prompt: list[int], n: int, length: int) -> None:
    """`n` samples of a prompt."""
    params = SamplingParams(max_tokens=length, temperature=1.0, seed=len(prompt), ignore_eos=True)
    namespace = BlockHash(random.randbytes(16))
    meter.sequences = [
        Sequence(SessionId("share"), list(prompt), len(prompt), params, namespace, choice=choice) for choice in range(n)
    ]
    engine.submit(meter.sequences)
    num_finished = 0
    while num_finished < n:
        num_finished += len(meter.outputs.get().finished)


def searched(meter: Meter, engine: Engine, prompt: list[int], width: int, length: int) -> None:
    """A search with `width` beams."""
    params = SamplingParams(max_tokens=length, beam_width=width, temperature=0.0, num_logprobs=2 * width)
    search, namespace = BeamSearch(params, frozenset()), BlockHash(random.randbytes(16))
    before: list[Sequence] = []
    while not search.is_over:
        sequences = [
            Sequence(
                SessionId("beams"),
                [*prompt, *beam.token_ids],
                len(prompt),
                replace(params, max_tokens=len(beam.token_ids) + 1),
                namespace,
                choice=number,
                keeps_blocks=True,
            )
            for number, beam in enumerate(search.beams)
        ]
        origins = [before[number] for number in search.origins] if before else []
        meter.sequences = sequences
        if before:
            engine.branch(before, list(zip(origins, sequences, strict=True)))
        else:
            engine.submit(sequences)
        found = {}
        while len(found) < len(sequences):
            found |= {sequence.sequence_id: logprobs for sequence, _, logprobs in meter.outputs.get().tokens}
        search.advance([top for s in sequences if (top := found[s.sequence_id]) is not None])
        before = sequences
    for sequence in before:
        engine.release(sequence)


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
    meter = Meter(block_size=settings.block_size)
    loaded = load_engine(settings, "decode", meter.on_step, lambda request: None)
    loaded.memory.unlink()
    engine = meter.engine = loaded.engine
    engine.start()
    tokenizer = Tokenizer.from_pretrained(resolve_model("pydoc-mini", with_weights=False))
    text = Path(__file__).read_text() * 4
    ids = tokenizer.encode(text, add_special_tokens=False)
    rng = random.Random(0)
    for name, (prompt_len, length) in WORKLOADS.items():
        starts = [rng.randrange(len(ids) - prompt_len) for _ in range(PROMPTS)]
        for label, run in (("samples", sampled), ("beams", searched)):
            for width in WIDTHS:
                meter.saved, before = [], engine.stats()
                for start in starts:
                    run(meter, engine, ids[start : start + prompt_len], width, length)
                after = engine.stats()
                computed = after.prefilled_tokens - before.prefilled_tokens
                share = 100 * statistics.mean(meter.saved)
                print(f"{name:24} {width} {label:8} {share:5.1f} % of blocks saved; {computed} tokens in chunks")
    engine.stop()


if __name__ == "__main__":
    main()
