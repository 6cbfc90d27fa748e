"""One process of test_two_ranks_are_one_with_the_union: a step on the same batch, gradients written to a file."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from conftest import corpus
from embedtune.encoder.embedder import load_trainable
from embedtune.fit import ranks
from embedtune.fit.dropout import KeyedNoise, key_dropout
from embedtune.fit.objectives.contrastive import MaskedRanking
from embedtune.fit.objectives.embedding import EmbeddingObjective
from embedtune.fit.objectives.texts import ANCHOR, DOCUMENT, Texts
from embedtune.recipes import Ranking


def main(model: str, folder: str, rank: int, world: int) -> None:
    if world > 1:
        store = Path(folder) / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    opened = load_trainable(Path(model))
    lines = list(dict.fromkeys(line for line in corpus(60, seed=5).splitlines() if line))
    texts = Texts()
    cells = [[texts.number(ANCHOR, lines[3 * i])] + [texts.number(DOCUMENT, lines[3 * i + k]) for k in (1, 2)]
             for i in range(9)]  # fmt: skip
    prompts = {ANCHOR: "", DOCUMENT: ""}
    tokens = texts.tokenize(
        opened.model.tokenizer, prompts, 64, Path(folder) / f"tokens-{world}"
    )  # the first one writes
    noise, table = KeyedNoise(0), np.array(cells)
    key_dropout(opened.model, noise)
    loss = MaskedRanking(Ranking(scale=20.0, similarity="cosine", symmetric=True), table, None)
    objective = EmbeddingObjective(opened.model, tokens, table, loss, lambda step: (0, np.arange(9)), noise, [])
    result = objective.step(0, 0, np.arange(9), 40)
    parameters = [p for p in opened.model.parameters() if p.requires_grad]
    found_loss, _ = ranks.mean_gradients(parameters, result.weight, result.loss, result.tokens)
    found = {name: p.grad.numpy() for name, p in opened.model.named_parameters() if p.grad is not None}
    kept = {name: grad for name, grad in found.items() if np.abs(grad).max() > 0}
    np.savez(Path(folder) / f"{world}-{rank}.npz", loss=np.array(found_loss), **kept)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
