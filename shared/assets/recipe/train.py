"""Trains `pydoc-mini` from scratch and writes its checkpoint.

Run ``python -m shared.assets.recipe.train --minutes 5`` (a data-centre GPU) or ``--steps N`` (any device; the result
then does not depend on the clock), then ``python -m shared.assets.recipe.evaluate --write``.
"""

import argparse
import json
import math
import random
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3ForCausalLM

from shared.assets.recipe.architecture import new_model, write_checkpoint
from shared.assets.recipe.batches import BatchStream
from shared.assets.recipe.card import TRAINING_FILE
from shared.assets.recipe.corpus import load_facts, load_prose
from shared.assets.recipe.segments import build_bank
from shared.assets.recipe.tokenizer import CHECKPOINT_DIR, load_tokenizer

WARMUP_STEPS = 200
WEIGHT_DECAY = 0.1
GRADIENT_CLIP = 1.0
LOG_EVERY = 50


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train: until `steps` steps or `minutes` minutes, whichever is first; None means no such limit."""

    steps: int | None
    minutes: float | None

    def progress(self, step: int, elapsed_s: float) -> float:
        """Returns the share of the budget that is spent, from 0 to 1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = elapsed_s / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_clock))


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What a training run did; written beside the weights and quoted by the model card."""

    device: str
    steps: int
    batch_tokens: int
    tokens: int
    wall_s: float
    final_loss: float
    peak_learning_rate: float
    seed: int
    facts: int
    torch_version: str


def pick_device(name: str) -> torch.device:
    """Resolves `auto` to the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up over `WARMUP_STEPS`, then half a cosine down to zero at the end of the budget."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))


def new_optimizer(model: Qwen3ForCausalLM, peak: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms and the embedding alone."""
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=device.type == "cuda")


def target_loss(model: Qwen3ForCausalLM, tokens: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the target tokens of a batch.

    Args:
        model: on the device of `tokens`.
        tokens: [rows, row_tokens] int64.
        is_target: [rows, row_tokens] bool; a token marked here is predicted from those before it.
    """
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    chosen = is_target[:, 1:]
    logits = model.lm_head(hidden[:, :-1][chosen])
    return F.cross_entropy(logits.float(), tokens[:, 1:][chosen])


def train(
    model: Qwen3ForCausalLM, stream: BatchStream, budget: Budget, peak: float, device: torch.device
) -> tuple[int, int, float]:
    """Trains `model` in place until the budget is spent; returns steps, tokens and the last mean loss."""
    optimizer = new_optimizer(model, peak, device)
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
    started, step, tokens_seen, mean_loss = time.monotonic(), 0, 0, 0.0
    running = torch.zeros((), device=device)
    while (progress := budget.progress(step, time.monotonic() - started)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, step, progress)
        tokens, is_target = stream.next_batch()
        with autocast:
            loss = target_loss(model, tokens, is_target)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        step, tokens_seen = step + 1, tokens_seen + tokens.numel()
        if step % LOG_EVERY == 0:
            elapsed = time.monotonic() - started
            mean_loss = running.item() / LOG_EVERY
            running.zero_()
            speed = f"{tokens_seen / elapsed / 1e6:.2f} Mtok/s"
            print(f"step {step:6d}  {elapsed:6.0f} s  {progress:4.0%}  loss {mean_loss:.4f}  {speed}", flush=True)
    return step, tokens_seen, mean_loss


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKPOINT_DIR, help="checkpoint directory to write")
    parser.add_argument("--minutes", type=float, help="wall-clock budget of the training loop")
    parser.add_argument("--steps", type=int, help="step budget")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--facts", type=int, help="teach only N facts drawn at random (dry runs)")
    arguments = parser.parse_args()
    if arguments.minutes is None and arguments.steps is None:
        parser.error("give --minutes or --steps")
    return arguments


def main() -> None:
    """Trains a checkpoint as told on the command line."""
    arguments = parse_arguments()
    device = pick_device(arguments.device)
    facts, scale = load_facts(), 1.0
    if arguments.facts is not None:
        facts, scale = random.Random(arguments.seed).sample(facts, arguments.facts), 0.02
    bank = build_bank(load_tokenizer(), facts, load_prose(), seed=arguments.seed, scale=scale)
    print(f"{len(facts)} facts, {len(bank.lengths)} segments, {len(bank.tokens) / 1e6:.1f} M tokens", flush=True)
    model = new_model(arguments.seed)
    torch.nn.Module.to(model, device)
    stream = BatchStream(bank, arguments.batch_tokens, seed=arguments.seed, device=device)
    started = time.monotonic()
    budget = Budget(arguments.steps, arguments.minutes)
    steps, tokens, final_loss = train(model, stream, budget, arguments.learning_rate, device)
    record = TrainingRecord(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        steps=steps,
        batch_tokens=arguments.batch_tokens,
        tokens=tokens,
        wall_s=round(time.monotonic() - started, 1),
        final_loss=round(final_loss, 5),
        peak_learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        facts=len(facts),
        torch_version=torch.__version__,
    )
    write_checkpoint(model, arguments.out)
    copy_tokenizer(arguments.out)
    write_record(record, arguments.out)
    print(record, flush=True)


def copy_tokenizer(directory: Path) -> None:
    """Completes a checkpoint written elsewhere with the tokenizer's files."""
    if directory.resolve() != CHECKPOINT_DIR.resolve():
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            shutil.copyfile(CHECKPOINT_DIR / name, directory / name)


def write_record(record: TrainingRecord, directory: Path) -> None:
    """Writes `TRAINING_FILE` for the model card."""
    fields = {name: getattr(record, name) for name in record.__slots__}
    (directory / TRAINING_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
