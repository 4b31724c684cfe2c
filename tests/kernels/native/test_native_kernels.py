"""The native kernels against the oracle on every instruction set of this machine, and equal bits in every batch."""

import ctypes
import random
import shutil

import pytest
import torch
import torch.nn.functional as F

from kernels import reference
from kernels.cpu.build import COMPILERS, supported_isas
from kernels.cpu.decoder_step import DecoderStep, NativeLayer, batch_of
from kernels.cpu.library import KV_TYPES, Library
from kernels.cpu.packed_linear import native_linear
from kernels.quantization import Quantization
from kernels.reference.quantized_kv import SCALE_BYTES

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)
KV_DTYPES = [torch.float32, torch.bfloat16, torch.int8]
BLOCK = 8
SENTINEL = -77.0


@pytest.fixture(scope="module", params=supported_isas(), ids=lambda isa: isa.name)
def library(request):
    return Library(request.param, 2)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual, expected, dtype=torch.float32):
    torch.testing.assert_close(actual.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (31, 7), (33, 64), (97, 129), (70, 711)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_equals_reference_and_a_row_does_not_depend_on_its_batch(library, dtype, outputs, inputs, with_bias):
    weight = randn(outputs, inputs, seed=1).div(inputs**0.5).to(dtype)
    bias = randn(outputs, dtype=dtype, seed=2) if with_bias else None
    linear = native_linear(library, Quantization.NONE, weight, bias)
    x = randn(203, inputs, seed=3).to(dtype).float()
    whole = linear.multiply(x)
    assert_near(whole, F.linear(x, weight.float(), None if bias is None else bias.float()))
    for begin, end in [(0, 0), (0, 1), (1, 3), (3, 6), (2, 6), (1, 6), (5, 22), (3, 67), (100, 203)]:
        assert linear.multiply(x[begin:end]).equal(whole[begin:end])
    out = torch.full((5, outputs), SENTINEL)
    library.calls.tandem_multiply(library.team, linear.handle, x.data_ptr(), None, 0.0, 3, out.data_ptr())
    assert out[:3].equal(whole[:3])
    assert bool((out[3:] == SENTINEL).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_are_kept_by_their_threads_to_the_bit(library, dtype):
    """1,189 rows are several blocks for each of three threads."""
    weight, x = randn(70, 129, dtype=dtype, seed=1), randn(1189, 129, seed=3)
    whole = native_linear(Library(library.isa, 1), Quantization.NONE, weight, None).multiply(x)
    assert_near(whole / 129**0.5, F.linear(x.to(dtype).float(), weight.float()) / 129**0.5, dtype)
    for num_threads in (2, 3):
        linear = native_linear(Library(library.isa, num_threads), Quantization.NONE, weight, None)
        for rows in (257, 770, 1189):
            assert linear.multiply(x[:rows]).equal(whole[:rows])


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 64), (7, 100), (33, 17)])
def test_elementwise_ops_equal_reference(library, rows, width):
    x, weight, wide = randn(rows, width), randn(width, seed=1), randn(rows, 2 * width, seed=2) * 4
    out = torch.full((rows + 1, width), SENTINEL)
    library.calls.tandem_rms_norm(x.data_ptr(), weight.data_ptr(), rows, width, 1e-5, out.data_ptr())
    assert_near(out[:-1], reference.rms_norm(x, weight, 1e-5))
    library.calls.tandem_silu_and_mul(wide.data_ptr(), rows, width, out.data_ptr())
    assert_near(out[:-1], reference.silu_and_mul(wide))
    assert bool((out[-1] == SENTINEL).all())


def filled_cache(lengths, dtype, kv_heads, head_dim):
    """Random keys and values in scattered blocks, garbage past each end; of three layers the middle one."""
    widths = [-(-length // BLOCK) for length in lengths]
    ids = list(range(sum(widths) + 1))
    random.Random(0).shuffle(ids)
    garbage, pad = (101, SCALE_BYTES) if dtype == torch.int8 else (1e4, 0)
    cache = torch.full((len(ids), 3, 2, BLOCK, kv_heads, head_dim + pad), garbage, dtype=dtype)[:, 1]
    tables = torch.full((len(lengths), max(widths) + 1), ids.pop(), dtype=torch.int32)
    for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        tables[row, :width] = torch.tensor([ids.pop() for _ in range(width)])
        positions = torch.arange(length)
        keys, values = randn(2, length, kv_heads, head_dim, seed=row)
        reference.write_kv(keys, values, cache, tables[row, positions // BLOCK].long() * BLOCK + positions % BLOCK)
    return cache, tables


def attend(library, query, cache, tables, starts, lengths):
    """Attention with scale 0.3; the output has a row of sentinels more."""
    heads, kv_heads, head_dim = query.shape[1], cache.shape[3], query.shape[2]
    empty = torch.empty(query.shape[0], dtype=torch.int64)
    batch = batch_of(empty, empty, tables, starts, lengths)
    out = torch.full((query.shape[0] + 1, heads, head_dim), SENTINEL)
    library.calls.tandem_paged_attention(
        library.team, KV_TYPES[cache.dtype], cache.data_ptr(), cache.stride(0) * cache.element_size(), BLOCK, kv_heads,
        head_dim, ctypes.byref(batch), query.data_ptr(), heads, 0.3, out.data_ptr(),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(6, 2, 64), (3, 1, 24), (4, 4, 2), (8, 1, 40), (2, 1, 130)]
)
def test_attention_equals_reference_and_ignores_what_lies_past_the_end(library, dtype, heads, kv_heads, head_dim):
    runs = [(1, 1), (1, 130), (17, 17), (33, 70), (1, 64), (5, 65), (1, 1030), (3, 513), (40, 530)]
    cache, tables = filled_cache([length for _, length in runs], dtype, kv_heads, head_dim)
    starts = torch.tensor([0, *torch.tensor([q for q, _ in runs]).cumsum(0).tolist()], dtype=torch.int32)
    lengths = torch.tensor([length for _, length in runs], dtype=torch.int32)
    query = randn(int(starts[-1]), heads, head_dim)
    out = attend(library, query, cache, tables, starts, lengths)
    expected = reference.paged_attention(
        query, cache, tables, starts, lengths, scale=0.3, max_query_len=40, max_seq_len=1030
    )
    # The instruction sets that multiply pairs of bfloat16 round queries and weights to it.
    assert_near(out[:-1], expected, torch.float32 if dtype == torch.float32 else torch.bfloat16)
    assert bool((out[-1] == SENTINEL).all())


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (40, 20), (21, 7)])
def test_heads_taken_together_have_the_bits_of_heads_alone(library, dtype, heads, kv_heads):
    """Many short runs let a thread take a sequence's heads at once, as many as fit; a few do not."""
    lengths = torch.tensor([1 + 71 * i for i in range(24)], dtype=torch.int32)
    cache, tables = filled_cache(lengths.tolist(), dtype, kv_heads, 40)
    query = randn(len(lengths), heads, 40)
    out = attend(library, query, cache, tables, torch.arange(len(lengths) + 1, dtype=torch.int32), lengths)
    for i in range(len(lengths)):
        one = slice(i, i + 1)
        alone = attend(library, query[one], cache, tables[one], torch.arange(2, dtype=torch.int32), lengths[one])
        assert alone[:-1].equal(out[one])


# hidden, heads, kv_heads, head_dim, intermediate: heads and halves of the feed-forward that are parts of a panel of 32
# outputs, or straddle two; and such as have panels to themselves.
ODD, WHOLE = (48, 6, 2, 16, 72), (64, 4, 2, 64, 192)


class TinyModel:
    """Two layers of random weights, once native and once as reference ops."""

    vocab, eps = 50, 1e-5

    def __init__(self, library, dtype, *, head_norms, shape=ODD, quantization=Quantization.NONE):
        self.quantization = quantization
        self.hidden, self.heads, self.kv_heads, self.head_dim, intermediate = shape
        hidden, width = self.hidden, (self.heads + 2 * self.kv_heads) * self.head_dim
        shapes = [(width, hidden), (hidden, self.heads * self.head_dim), (2 * intermediate, hidden)]
        shapes.append((hidden, intermediate))
        self.dtype = dtype
        self.embedding = randn(self.vocab, self.hidden, seed=9).to(dtype)
        angles = torch.outer(torch.arange(1200.0), torch.logspace(0, -3, self.head_dim // 2))
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
        norm_sizes = (hidden, hidden, self.head_dim, self.head_dim)
        self.layers = []
        for i in range(2):
            weights = [randn(*shape, seed=10 * i + n).div(7).to(dtype) for n, shape in enumerate(shapes)]
            biases = [randn(shape[0], seed=50 + n).to(dtype) for n, shape in enumerate(shapes)]
            norms = [1 + randn(size, seed=i + n).div(5).to(dtype) for n, size in enumerate(norm_sizes)]
            self.layers.append((weights, biases, norms[:2], norms[2:] if head_norms else [None, None]))
        self.native = self.step_of(library)

    def step_of(self, library):
        layers = [
            NativeLayer(n[0], pairs[0], h[0], h[1], pairs[1], n[1], pairs[2], pairs[3])
            for w, b, n, h in self.layers
            for pairs in [[native_linear(library, self.quantization, *pair) for pair in zip(w, b, strict=True)]]
        ]
        return DecoderStep(
            library, layers, embedding=self.embedding, cos_sin=self.cos_sin, num_heads=self.heads,
            num_kv_heads=self.kv_heads, eps=self.eps,
        )  # fmt: skip

    def cache(self, num_blocks=64, dtype=None):
        dtype = dtype or self.dtype
        width = self.head_dim + (SCALE_BYTES if dtype == torch.int8 else 0)
        return torch.zeros(num_blocks, 2, 2, BLOCK, self.kv_heads, width, dtype=dtype)

    def run(self, cache, runs, step=None):
        """`runs`: (token ids, number already computed, block table); returns hidden of the new tokens, per run."""
        tokens = [t for ids, done, _ in runs for t in ids[done:]]
        positions = [p for ids, done, _ in runs for p in range(done, len(ids))]
        slots = [table[p // BLOCK] * BLOCK + p % BLOCK for ids, done, table in runs for p in range(done, len(ids))]
        counts = [len(ids) - done for ids, done, _ in runs]
        width = max(len(table) for _, _, table in runs)
        arguments = [
            torch.tensor(tokens), torch.tensor(positions), torch.tensor(slots),
            torch.tensor([table + [table[0]] * (width - len(table)) for _, _, table in runs], dtype=torch.int32),
            torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32),
            torch.tensor([len(ids) for ids, _, _ in runs], dtype=torch.int32),
        ]  # fmt: skip
        layers = [cache[:, i] for i in range(2)]
        return torch.split((step or self.native)(*arguments, layers), counts)

    def expected(self, ids):
        """Float32 forward pass of one sequence, by reference ops."""
        cache, length = self.cache(32).float(), len(ids)
        x, positions = self.embedding.float()[ids], torch.arange(length)
        table = torch.arange(32, dtype=torch.int32)[None]
        for i, (w, b, n, h) in enumerate(self.layers):
            w, b, n = ([t.float() for t in group] for group in (w, b, n))
            heads = F.linear(reference.rms_norm(x, n[0], self.eps), w[0], b[0]).view(length, -1, self.head_dim)
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
            if h[0] is not None:
                q, k = (
                    reference.rms_norm(t.flatten(0, 1), m, self.eps).view(t.shape) for t, m in ((q, h[0]), (k, h[1]))
                )
            reference.rotary(q, k, positions, self.cos_sin)
            reference.write_kv(k, v, cache[:, i], positions)
            starts, lengths = torch.tensor([0, length]), torch.tensor([length])
            attended = reference.paged_attention(
                q,
                cache[:, i],
                table,
                starts,
                lengths,
                scale=self.head_dim**-0.5,
                max_query_len=length,
                max_seq_len=length,
            )
            x = x + F.linear(attended.flatten(1), w[1], b[1])
            x = x + F.linear(
                reference.silu_and_mul(F.linear(reference.rms_norm(x, n[1], self.eps), w[2], b[2])), w[3], b[3]
            )
        return x


def prompts(count, source, longest=90, num_blocks=64):
    tables = list(range(num_blocks))
    source.shuffle(tables)
    lengths = [source.randint(1, longest) for _ in range(count)]
    return [
        ([source.randrange(TinyModel.vocab) for _ in range(n)], [tables.pop() for _ in range(-(-n // BLOCK))])
        for n in lengths
    ]


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [1, 24, 64])
def test_keys_and_values_are_stored_as_the_reference_stores_them(library, dtype, head_dim):
    pad = SCALE_BYTES if dtype == torch.int8 else 0
    expected = torch.full((4, 3, 2, BLOCK, 2, head_dim + pad), 77, dtype=dtype)
    actual, key, value = expected.clone(), *randn(2, 5, 2, head_dim, seed=4)
    key[1] = 0
    slots = torch.tensor([3, 17, -1, 31, 8])
    reference.write_kv(key, value, expected[:, 1], slots)
    layer = actual[:, 1]
    library.calls.tandem_write_kv(
        KV_TYPES[dtype], layer.data_ptr(), layer.stride(0) * layer.element_size(), BLOCK, 2, head_dim,
        5, slots.data_ptr(), key.data_ptr(), value.data_ptr(),
    )  # fmt: skip
    assert actual.equal(expected)


@pytest.mark.parametrize(("dtype", "kv_dtype"), [(d, k) for d in DTYPES for k in KV_DTYPES])
@pytest.mark.parametrize(("head_norms", "shape"), [(False, ODD), (True, ODD), (True, WHOLE)])
def test_step_equals_reference_model(library, dtype, kv_dtype, head_norms, shape):
    model = TinyModel(library, dtype, head_norms=head_norms, shape=shape)
    sequences = prompts(3, random.Random(1))
    hidden = model.run(model.cache(dtype=kv_dtype), [(ids, 0, table) for ids, table in sequences])
    for (ids, _), actual in zip(sequences, hidden, strict=True):
        expected = model.expected(ids)
        error = (actual - expected).norm() / expected.norm()
        assert float(error) < (1e-5 if dtype == kv_dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "quantization"),
    [
        (torch.float32, torch.float32, Quantization.NONE),
        (torch.bfloat16, torch.bfloat16, Quantization.NONE),
        (torch.float32, torch.int8, Quantization.INT8),
        (torch.bfloat16, torch.bfloat16, Quantization.INT4),
    ],
)
@pytest.mark.parametrize(("seed", "longest", "shape"), [(0, 90, ODD), (1, 90, WHOLE), (3, 1100, ODD)])
def test_bits_do_not_depend_on_batch_chunks_or_threads(library, dtype, kv_dtype, quantization, seed, longest, shape):
    source = random.Random(seed)
    model = TinyModel(library, dtype, head_norms=True, shape=shape, quantization=quantization)
    sequences = prompts(5, source, longest, num_blocks=800)
    alone, alone_cache = [], model.cache(800, kv_dtype)
    for ids, table in sequences:
        alone += model.run(alone_cache, [(ids, 0, table)])
    for num_threads in (1, 2, 3):
        step = model.step_of(Library(library.isa, num_threads))
        cache, done = model.cache(800, kv_dtype), [0] * len(sequences)
        pieces = [[] for _ in sequences]
        while pending := [i for i, (ids, _) in enumerate(sequences) if done[i] < len(ids)]:
            chosen = source.sample(pending, source.randint(1, len(pending)))
            sizes = [1, 1, 3, 17, 40] if longest < 512 or source.random() < 0.1 else [170, 400]
            ends = [min(len(sequences[i][0]), done[i] + source.choice(sizes)) for i in chosen]
            runs = [(sequences[i][0][:end], done[i], sequences[i][1]) for i, end in zip(chosen, ends, strict=True)]
            for i, end, hidden in zip(chosen, ends, model.run(cache, runs, step), strict=True):
                pieces[i].append(hidden)
                done[i] = end
        for expected, parts in zip(alone, pieces, strict=True):
            assert torch.cat(parts).equal(expected)
        assert cache.equal(alone_cache)
