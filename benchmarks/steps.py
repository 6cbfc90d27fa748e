"""What benchmarks of training share: random weights, steps of our engine and of its peers, and how rounds are told.

Nothing is measured here. `classify.py`, `shapes.py`, `gpu.py`, `guard.py`, `mlm.py` and `contrastive.py` use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {"model_type": "bert", "num_hidden_layers": 12, "intermediate_size": 3072,
                  "max_position_embeddings": 512},
    "modernbert": {"model_type": "modernbert", "num_hidden_layers": 22, "intermediate_size": 1152,
                   "max_position_embeddings": 8192, "local_attention": 128, "global_attn_every_n_layers": 3},
}  # fmt: skip
WIDE = {"hidden_size": 768, "num_attention_heads": 12}
TINY = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 4}
MASKED, LR, DECAY, CLIP = 0.15, 5e-5, 0.01, 1.0
Step = Callable[[int], int]  # from its number to the real tokens it took


# ---------------------------------------------------------------- models


def model_folder(name: str, home: Path, layers: int | None = None, tiny: bool = False) -> str:
    """A folder with random weights where `name` is a shape, made in `home`; else `name`.

    The tokenizer is all-MiniLM-L6-v2's, so the vocabulary has 30,522 tokens (ModernBERT's own has 50,368).
    """
    if name not in SHAPES:
        return name
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    from embedtune.encoder import load

    load.quiet()
    values = {**WIDE, **SHAPES[name], **(TINY if tiny else {})}
    values["num_hidden_layers"] = layers or values["num_hidden_layers"]
    tokenizer = load.load_tokenizer(load.find(load.DEFAULT))
    tokenizer.model_max_length = values["max_position_embeddings"]
    ids = {"pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102}
    config = AutoConfig.for_model(**values, vocab_size=len(tokenizer), **ids)
    torch.manual_seed(0)
    folder = home / name
    folder.mkdir(parents=True)
    opened = load.Loaded(AutoModelForMaskedLM.from_config(config), tokenizer, folder, tokenizer.model_max_length)
    load.save(opened, folder)
    return str(folder)


# ---------------------------------------------------------------- rounds


def told(rounds: Sequence[dict[str, dict[str, Any]]], system: str, rate: str, unit: str) -> str:
    """Of one system's runs the middle (least to most) rate and the memory, and how many times as fast ours were."""
    rates = sorted(found[system][rate] for found in rounds)
    ratios = sorted(found["embedtune"][rate] / found[system][rate] for found in rounds)
    memory = median(found[system]["peak_mb"] for found in rounds)
    return (
        f"{median(rates):,.2f} {unit} ({rates[0]:,.2f} to {rates[-1]:,.2f}), {memory:,.0f} MB; embedtune is "
        f"{median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


# ---------------------------------------------------------------- steps


def as_the_command() -> None:
    """What `embedtune fit` does before all else: libraries are quiet, and few compiled shapes are kept."""
    from embedtune.encoder.load import quiet
    from embedtune.encoder.shapes import TRAINING, bound_memory

    quiet()
    bound_memory(TRAINING)


def engine_run(ready: Any, home: Path) -> Any:
    """The engine's run over a prepared recipe, at the first step; without scoring and checkpoints."""
    from embedtune.fit.derive import resolve
    from embedtune.fit.engine import Listener, Run, total_steps
    from embedtune.fit.optimizer import Optimizer

    objective = ready.objective
    loop = resolve(ready.recipe.loop, objective, ready.max_length, LR)
    compute = objective.body if loop.precision == "bf16" else None
    optimizer = Optimizer(objective.model, objective.head, loop.weight_decay, compute)
    total = total_steps(loop, objective.size, objective.head_steps)
    return Run(objective, loop, optimizer, lambda step: {}, home, lambda: None, Listener(), total)


def our_step(run: Any) -> Step:
    def step(number: int) -> int:
        before = run.state.tokens
        run._step()
        return run.state.tokens - before

    return step


def _updated(model: Any, forward: Callable[[int], tuple[Any, int]], bf16: bool, parts: int = 1) -> Step:
    """Steps of a stock model: `forward` gives loss and tokens of a batch; an update after `parts` of them."""
    import torch

    device = next(model.parameters()).device
    adam = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)

    def step(number: int) -> int:
        total = 0
        for part in range(parts):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, tokens = forward(number * parts + part)
            (loss / parts).backward()
            total += tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        adam.zero_grad()
        return total

    return step


def stock_mlm(
    folder: str, batches: Sequence[Sequence[Any]], bf16: bool, backend: str | None = None, parts: int = 1
) -> Step:
    """The stock masked language model over batches of token rows, padded to the longest; masks are drawn in the step.

    `backend`: compiled by torch, rows padded to multiples of 64, so that there are few shapes. An update is made after
    `parts` batches.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

    from embedtune.encoder.device import pick_device

    tokenizer, device = AutoTokenizer.from_pretrained(folder), pick_device()
    model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="sdpa").to(device).train()
    called = torch.compile(model, backend=backend) if backend else model
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED,
                                              pad_to_multiple_of=64 if backend else None)  # fmt: skip
    special = np.array(tokenizer.all_special_ids)
    ready = [
        [{"input_ids": row.tolist(), "attention_mask": [1] * len(row),
          "special_tokens_mask": np.isin(row, special).astype(int).tolist()} for row in rows]
        for rows in batches
    ]  # fmt: skip

    def forward(number: int) -> tuple[Any, int]:
        batch = collate(ready[number % len(ready)])
        return called(**batch.to(device)).loss, sum(map(len, batches[number % len(batches)]))

    return _updated(model, forward, bf16, parts)


def stock_contrastive(
    folder: str, batches: Sequence[Sequence[dict[str, str]]], max_length: int, bf16: bool, backend: str | None = None
) -> Step:
    """sentence-transformers' MultipleNegativesRankingLoss over batches of pairs, made into padded tokens beforehand."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from embedtune.encoder.device import pick_device

    device = pick_device()
    model = SentenceTransformer(folder, device=str(device), model_kwargs={"attn_implementation": "sdpa"}).train()
    model.max_seq_length = max_length
    ready = [[model.preprocess([pair[side] for pair in some]) for side in ("anchor", "positive")] for some in batches]
    if backend:
        model[0].model.compile(backend=backend, dynamic=True)
    loss = MultipleNegativesRankingLoss(model)

    def forward(number: int) -> tuple[Any, int]:
        given = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in side.items()}
                 for side in ready[number % len(ready)]]  # fmt: skip
        return loss(given, None), sum(int(side["attention_mask"].sum()) for side in ready[number % len(ready)])

    return _updated(model, forward, bf16)
