"""The native kernels beside the roofs of the machine and torch: decode and prefill steps of well-known shapes.

    python -m loadtest.engine.kernels_bench --shapes 135m,500m --formats bf16,int8,int4,f32

Weights are random. A round runs every contestant once, rounds are interleaved, medians count. `read` is the share of
the memory roof that a step's weights alone come to, `dot` the share of the instruction roof: a step can be near one.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels.cpu.build import FLAGS, SOURCE, Isa, supported_isas
from kernels.cpu.decoder_step import DecoderStep, NativeLayer
from kernels.cpu.library import Format, Library
from kernels.cpu.packed_linear import NativeLinear, native_linear
from kernels.cpu.weight_memory import WeightMemory
from kernels.quantization import Quantization
from loadtest.engine.shapes import SHAPES

QUANTIZATIONS = {"int8": Quantization.INT8, "int4": Quantization.INT4}
DTYPES = {"f32": torch.float32}
BLOCK = 16
CONTEXT = 128
TASKS = {"decode 1": (1, 1), "decode 8": (8, 1), "decode 32": (32, 1), "prefill 512": (1, 512)}
"""Name: (sequences, new tokens of each)."""


class Roofs:
    """Read and dot roofs, compiled for an instruction set."""

    def __init__(self, isa: Isa, threads: int) -> None:
        source = Path(__file__).with_name("roofs.cpp")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "roofs.so"
            subprocess.run(["g++", *FLAGS, *isa.flags, f"-I{SOURCE}", "-o", path, source], check=True, timeout=300)
            self._calls = ctypes.CDLL(str(path))
        self._calls.roof_read.restype = self._calls.roof_dot.restype = ctypes.c_double
        self._calls.roof_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        self._threads = threads
        self._words = WeightMemory().allocate(384 << 20)  # on huge pages, as the weights: small ones halve the roof
        self._words.fill(1)

    def read_bytes_per_s(self) -> float:
        """Of 384 MiB, once."""
        seconds: float = self._calls.roof_read(self._words.ctypes.data, self._words.nbytes // 4, self._threads)
        return self._words.nbytes / seconds

    def dot_per_s(self, form: Format) -> float:
        """Multiply-adds."""
        rate: float = self._calls.roof_dot(form.value, self._threads)
        return rate


class RandomModel:
    """All layers and the head of a shape; every layer has its own memory but the values of the first."""

    def __init__(self, library: Library, shape: dict[str, object], form: str) -> None:
        dtype = DTYPES.get(form, torch.bfloat16)
        quantization = QUANTIZATIONS.get(form, Quantization.NONE)
        sizes = {name: value for name, value in shape.items() if isinstance(value, int)}
        self._hidden, self._kv_heads = sizes["hidden_size"], sizes["num_key_value_heads"]
        self._layers, heads, intermediate = (
            sizes[n] for n in ("num_hidden_layers", "num_attention_heads", "intermediate_size")
        )
        self._head_dim = self._hidden // heads
        self._dtype, self._vocab = dtype, sizes["vocab_size"]
        widths = [
            ((heads + 2 * self._kv_heads) * self._head_dim, self._hidden),
            (self._hidden, self._hidden),
            (2 * intermediate, self._hidden),
            (self._hidden, intermediate),
        ]
        norm = torch.ones(self._hidden)
        weights = [torch.randn(width).div(width[1] ** 0.5).to(dtype) for width in widths]
        self.body_parameters = self._layers * sum(weight.numel() for weight in weights)
        layers = []
        for _ in range(self._layers):
            qkv, out, gate_up, down = (native_linear(library, quantization, weight, None) for weight in weights)
            layers.append(NativeLayer(norm, qkv, None, None, out, norm, gate_up, down))
        embedding = torch.randn(self._vocab, self._hidden).to(dtype)
        self._head: NativeLinear = native_linear(library, quantization.of_lm_head, embedding, None)
        self.head_parameters = embedding.numel()
        self.weight_bytes = sum(
            linear.packed_bytes for layer in layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )
        self.weight_bytes += self._head.packed_bytes
        self._norm = norm
        self._step = DecoderStep(
            library,
            layers,
            embedding=embedding,
            cos_sin=torch.ones(2048, self._head_dim),
            num_heads=heads,
            num_kv_heads=self._kv_heads,
            eps=1e-5,
        )

    def task(self, sequences: int, new: int) -> Callable[[], None]:
        """One step: the sequences, of 128 tokens so far, get `new` more; logits for the last token of each."""
        blocks = -(-(CONTEXT + new) // BLOCK)
        cache = torch.zeros(
            sequences * blocks, self._layers, 2, BLOCK, self._kv_heads, self._head_dim, dtype=self._dtype
        )
        kv_layers = [cache[:, i] for i in range(self._layers)]
        tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
        done = CONTEXT if new == 1 else 0
        positions = torch.arange(done, done + new).repeat(sequences)
        slots = (torch.arange(sequences)[:, None] * blocks * BLOCK + torch.arange(done, done + new)).flatten()
        starts = torch.arange(0, sequences * new + 1, new, dtype=torch.int32)
        lengths = torch.full((sequences,), done + new, dtype=torch.int32)
        tokens = torch.randint(self._vocab, (sequences * new,))

        def run() -> None:
            hidden = self._step(tokens, positions, slots, tables, starts, lengths, kv_layers)
            self._head.multiply(hidden[new - 1 :: new], self._norm, 1e-5)

        return run

    def torch_task(self, sequences: int, new: int) -> Callable[[], None]:
        """The same matrix products alone, by torch: no attention, no norms."""
        heads = self._hidden // self._head_dim
        widths = [(heads + 2 * self._kv_heads) * self._head_dim, self._hidden]
        intermediate = (self.body_parameters // self._layers // self._hidden - sum(widths)) // 3
        shapes = [(widths[0], self._hidden), (widths[1], self._hidden), (2 * intermediate, self._hidden)]
        shapes.append((self._hidden, intermediate))
        dtype = torch.bfloat16 if self._dtype != torch.float32 else self._dtype
        weights = [[torch.ones(s, dtype=dtype) for s in shapes] for _ in range(self._layers)]
        head = torch.ones(self._vocab, self._hidden, dtype=dtype)
        inputs = {width: torch.ones(sequences * new, width, dtype=dtype) for width in (self._hidden, intermediate)}

        def run() -> None:
            for layer in weights:
                for weight in layer:
                    F.linear(inputs[weight.shape[1]], weight)
            F.linear(inputs[self._hidden][:sequences], head)

        return run


def measure(
    name: str, forms: list[str], tasks: list[str], library: Library, roofs: Roofs, rounds: int, with_torch: bool
) -> None:
    """Prints one shape's table."""
    models = {form: RandomModel(library, SHAPES[name], form) for form in forms}
    for task in tasks:
        sequences, new = TASKS[task]
        runs = {form: model.task(sequences, new) for form, model in models.items()}
        if with_torch:
            runs["torch bf16"] = models[forms[0]].torch_task(sequences, new)
        times: dict[str, list[float]] = {form: [] for form in runs}
        reads, dots = [], {form: [library_dot(roofs, form)] for form in forms}
        for _ in range(rounds):
            reads.append(roofs.read_bytes_per_s())
            for form, run in runs.items():
                started_s = time.perf_counter()
                run()
                times[form].append(time.perf_counter() - started_s)
                if form in dots:
                    dots[form].append(library_dot(roofs, form))
        read = statistics.median(reads)
        print(f"{name} {task}: read roof {read / 1e9:.1f} GB/s")
        for form, seconds in times.items():
            median = statistics.median(seconds)
            line = f"  {form:10s} {1e3 * median:8.2f} ms  {sequences * new / median:8.0f} tokens/s"
            if form in dots:
                model = models[form]
                products = sequences * (new * model.body_parameters + model.head_parameters)
                dot = statistics.median(dots[form])
                line += f"  read {model.weight_bytes / median / read:.2f}  dot {products / median / dot:.2f}"
                line += f" of {2 * dot / 1e9:.0f} Gop/s"
            print(line, flush=True)


def library_dot(roofs: Roofs, form: str) -> float:
    """The dot roof of a format by its name."""
    return roofs.dot_per_s(Format[form.upper()])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="135m,500m")
    parser.add_argument("--formats", default="bf16,int8,int4,f32")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--isa", default=supported_isas()[0].name)
    parser.add_argument("--no-torch", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library = Library(Isa[arguments.isa], arguments.threads)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    print(f"{model}, {arguments.threads} of {os.cpu_count()} threads, {arguments.isa}, torch {torch.__version__}")
    roofs = Roofs(Isa[arguments.isa], arguments.threads)
    with torch.inference_mode():
        for name in arguments.shapes.split(","):
            forms = arguments.formats.split(",")
            tasks = arguments.tasks.split(",")
            measure(name, forms, tasks, library, roofs, arguments.rounds, not arguments.no_torch)


if __name__ == "__main__":
    main()
