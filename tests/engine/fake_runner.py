"""A model whose KV is checkable: the KV of a token is a digest of everything up to it.

`FakeRunner` keeps a memory of slots like the real cache. Each step it verifies that every slot a sequence attends to
holds the digest of that sequence's own prefix: a block reused, evicted, shared or fetched wrongly fails at once. The
next token is a function of the prefix alone: disturbances may cost time but never change tokens.
"""

import random

from shared.engine.acquisition import KvAcquisition
from shared.engine.admission import check_admissible
from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.sampling_params import SamplingParams
from shared.engine.scheduler import Scheduler
from shared.engine.sequence import PENDING_TOKEN, Sequence, SequenceStatus
from shared.engine.step import StepBatch, StepOutputs, StepResult
from shared.identity import Fingerprint, SessionId, namespace_hash

NAMESPACE = namespace_hash(Fingerprint("fake"))
VOCABULARY = 50
GARBAGE = -1
_MASK = (1 << 61) - 1


def digests(token_ids, namespace=NAMESPACE):
    """KV of each token."""
    digest = int.from_bytes(namespace, "little") & _MASK
    out = []
    for token in token_ids:
        digest = (digest * 1_000_003 + token + 1) & _MASK
        out.append(digest)
    return out


def next_token(token_ids, namespace=NAMESPACE):
    """What the fake model says after these tokens."""
    return (digests(token_ids, namespace)[-1] >> 7) % VOCABULARY


def continuation(token_ids, num_tokens):
    """The undisturbed greedy output, without any stop token."""
    tokens = list(token_ids)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(token_ids) :]


class FakeRunner:
    """Deterministic stand-in for `ModelRunner`."""

    may_give_up = True

    def __init__(self, num_blocks, block_size):
        self.block_size = block_size
        self.memory = [[0] * block_size for _ in range(num_blocks)]
        self.batches = []
        self.sampled = {}
        self.given_up = 0

    def fill(self, slots, token_ids, first_block=0):
        """Puts the KV of a prompt's blocks into slots, as a transport would."""
        values = digests(token_ids)
        for i, slot in enumerate(slots, first_block):
            self.memory[slot] = values[i * self.block_size : (i + 1) * self.block_size]

    def execute(self, batch: StepBatch) -> StepResult:
        return LateStep(self, batch).result()

    def written_in(self, batch, tables, *, but):
        """Blocks that other sequences write to in the step."""
        return {
            block
            for e, table in zip(batch.scheduled, tables, strict=True)
            if e is not but
            for block in table[e.num_computed // self.block_size : -(-e.end // self.block_size)]
        }

    def give_up(self, batch, tables):
        """The step, ended early: nothing in the slots it was to write is anybody's KV."""
        for entry, table in zip(batch.scheduled, tables, strict=True):
            for position in range(entry.num_computed, entry.end):
                self.memory[table[position // self.block_size]][position % self.block_size] = GARBAGE
        self.given_up += 1
        return StepResult(token_ids=[], logprobs=[], was_given_up=True)

    def compute(self, batch, token_lists, tables) -> StepResult:
        """The step, with what the sequences were when it was launched."""
        self.batches.append([(e.sequence.sequence_id, e.num_computed, e.num_new_tokens) for e in batch.scheduled])
        written = {block for e, table in zip(batch.scheduled, tables, strict=True) for block in table}
        for source, destination in batch.copies:
            assert destination in written, f"block {destination} is copied to for nobody in the step"
            self.memory[destination] = list(self.memory[source])
        if batch.unwanted.value and self.may_give_up:
            return self.give_up(batch, tables)
        token_ids, sampled = [], {}
        for entry, tokens, table in zip(batch.scheduled, token_lists, tables, strict=True):
            sequence_id, namespace = entry.sequence.sequence_id, entry.sequence.namespace
            if tokens[-1] == PENDING_TOKEN:
                tokens[-1] = self.sampled[sequence_id]
            values = digests(tokens, namespace)
            writes = set(table[entry.num_computed // self.block_size : -(-entry.end // self.block_size)])
            assert not writes & self.written_in(batch, tables, but=entry), "two sequences write to one block"
            for position in range(entry.end):
                block = self.memory[table[position // self.block_size]]
                if position >= entry.num_computed:
                    block[position % self.block_size] = values[position]
                assert block[position % self.block_size] == values[position], f"foreign KV at position {position}"
            if entry.samples:
                assert entry.end == len(tokens)
                token_ids.append(next_token(tokens, namespace))
                sampled[sequence_id] = token_ids[-1]
        self.sampled = sampled
        return StepResult(token_ids=token_ids, logprobs=[None] * len(token_ids))


class LateStep:
    """Reads the sequences when it is launched and touches the cache as late as it can: when its result is taken."""

    def __init__(self, runner, batch):
        self.runner, self.batch = runner, batch
        self.token_lists = [list(e.sequence.token_ids) for e in batch.scheduled]
        self.tables = [list(e.sequence.block_table) for e in batch.scheduled]

    def result(self):
        return self.runner.compute(self.batch, self.token_lists, self.tables)


class PipelinedFakeRunner(FakeRunner):
    """Takes two steps at a time, like a device."""

    max_in_flight = 2
    may_give_up = False

    def launch(self, batch):
        return LateStep(self, batch)


def sequence(token_ids, max_tokens=8, *, session="s", acquiring=False, arrival_s=None, **fields):
    """A sequence to submit; `max_tokens=0` makes it prefill-only."""
    made = Sequence(
        session_id=SessionId(session),
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0) if max_tokens else None,
        namespace=NAMESPACE,
        status=SequenceStatus.WAITING_FOR_KV if acquiring else SequenceStatus.WAITING,
        **fields,
    )
    if arrival_s is not None:
        made.arrival_s = arrival_s
    return made


def prompt(num_tokens, seed=0):
    """The first tokens of an endless text; different seeds share no block."""
    return random.Random(seed).choices(range(1000), k=num_tokens)


def merge(collected: StepOutputs, outputs: StepOutputs) -> None:
    """Appends one step's outputs to others."""
    collected.tokens += outputs.tokens
    collected.finished += outputs.finished
    collected.prefilled += outputs.prefilled
    collected.sealed += outputs.sealed
    collected.evicted += outputs.evicted


class Bench:
    """Scheduler, pool and fake runner in one hand, stepped by the test."""

    def __init__(self, num_blocks=64, block_size=4, **config):
        self.pool = BlockPool(num_blocks, block_size)
        config = {"max_model_len": 4096, "max_batch_tokens": 32, "max_sequences": 8, **config}
        self.config = EngineConfig(block_size=block_size, **config)
        self.scheduler = Scheduler(self.pool, self.config)
        self.acquisition = KvAcquisition(self.pool, self.scheduler)
        self.runner = FakeRunner(num_blocks, block_size)
        self.outputs = StepOutputs()

    def submit(self, *sequences):
        for one in sequences:
            check_admissible(one, self.config, self.pool.num_blocks)
            self.scheduler.tables.name_blocks(one, one.num_tokens // self.pool.block_size)
            self.scheduler.add(one)

    def branch(self, kept, *branches):
        """As `Engine.branch`."""
        for origin, one in branches:
            self.scheduler.tables.name_blocks(one, one.num_tokens // self.pool.block_size)
            self.scheduler.add(one, branches_off=origin)
        for origin in kept:
            self.scheduler.tables.release(origin)

    def step(self):
        """One whole step; returns `(sequence id, computed, new tokens)` of what ran."""
        batch = self.scheduler.schedule()
        result = self.runner.execute(batch)
        merge(self.outputs, self.scheduler.update(batch, result))
        self.check()
        return self.runner.batches[-1]

    def run(self, max_steps=2000):
        """Steps until nothing can run."""
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"still running after {max_steps} steps")

    def check(self):
        self.scheduler.check_integrity(self.acquisition.reserved)

    def fetch(self, one, num_blocks):
        """Reserves, fills and commits the next blocks of a prompt; False if there is no room."""
        first = len(one.block_table)
        slots = self.acquisition.reserve(one, num_blocks)
        self.runner.fill(slots, one.token_ids, first)
        self.acquisition.commit(one, slots, one.block_hashes[first : first + len(slots)])
        self.check()
        return bool(slots)

    @property
    def finished(self):
        return [(one.sequence_id, one.finish_reason.value) for one in self.outputs.finished]
