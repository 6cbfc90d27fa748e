"""Claim: texts become vectors faster than elsewhere on the same machine, and in fp32 they are the same vectors.

The same texts for all, in alternating runs after a warm-up, medians. Beside each speed stands its quality: worst and
mean cosine to sentence-transformers' own fp32 vectors. Contenders that are not installed are named and left out.

    python benchmarks/encode.py --data scifact/corpus.jsonl --texts 2000 --runs 5 [--threads 2] [--only ours sentence]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from embedtune.data.example import docstrings
from embedtune.data.read import read_rows
from embedtune.encoder.device import has_bf16
from embedtune.encoder.embed import batches, embed
from embedtune.encoder.embedder import load_embedder
from embedtune.encoder.load import find
from steps import model_folder

BUDGETS = (2048, 8192)  # padded tokens of a batch for the peers that are fed by us, who are as good as the better one
Encode = Callable[[list[str]], np.ndarray]


def ours(folder: Path, precision: str) -> Encode:
    model, _ = load_embedder(folder, precision)
    return lambda texts: np.concatenate([part.vectors for part in embed(model, texts)])


def stock(folder: Path, dtype: torch.dtype) -> Encode:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": dtype})
    # "precision" is what the vectors are turned into afterwards; numpy has no bf16, so they come as tensors.
    return lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=False).float().numpy()


def padded(folder: Path, run: Callable[[dict[str, np.ndarray]], np.ndarray], budget: int) -> Encode:
    """Length-sorted, padded batches under a budget of tokens; `run` gives hidden states (B, L, D)."""
    model, _ = load_embedder(folder)
    tokenizer, limit = model.tokenizer, model.max_seq_length

    def encode(texts: list[str]) -> np.ndarray:
        ids = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        sizes = np.array([len(row) for row in ids])
        order, found = np.argsort(-sizes, kind="stable"), []
        for part in batches(sizes[order], budget, padded=True):
            given = tokenizer.pad({"input_ids": [ids[i] for i in order[part]]}, return_tensors="np")
            mask = given["attention_mask"].astype(np.int64)
            hidden = run({"input_ids": given["input_ids"].astype(np.int64), "attention_mask": mask})
            mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
            found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(found)[np.argsort(order)].astype(np.float32)

    return encode


def backbone(folder: Path) -> torch.nn.Module:
    from transformers import AutoModel

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder, attn_implementation="eager", trust_remote_code=False)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    return Hidden().eval()


EXAMPLE = {"input_ids": torch.ones(2, 9, dtype=torch.int64), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}


def onnx(folder: Path, int8: bool, scratch: Path, budget: int) -> Encode:
    import onnxruntime

    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    path = scratch / "model.onnx"
    if not path.exists():
        axes = {name: {0: "rows", 1: "length"} for name in EXAMPLE}
        torch.onnx.export(backbone(folder), tuple(EXAMPLE.values()), str(path), input_names=list(EXAMPLE),
                          output_names=["hidden"], dynamic_axes={**axes, "hidden": {0: "rows", 1: "length"}},
                          dynamo=False)  # fmt: skip
    if int8:
        quantize_dynamic(path, scratch / "int8.onnx", weight_type=QuantType.QInt8)
        path = scratch / "int8.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options)
    return padded(folder, lambda given: session.run(["hidden"], given)[0], budget)


def openvino(folder: Path, precision: str, budget: int) -> Encode:
    import openvino as ov

    model = ov.convert_model(backbone(folder), example_input=EXAMPLE)
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = ov.Core().compile_model(model, "CPU", settings)
    return padded(folder, lambda given: compiled(given)[0], budget)


def contenders(folder: Path, scratch: Path) -> dict[str, Callable[[], Encode]]:
    found = {
        "ours fp32": lambda: ours(folder, "fp32"),
        "ours bf16": lambda: ours(folder, "bf16"),
        "sentence-transformers fp32": lambda: stock(folder, torch.float32),
        "sentence-transformers bf16": lambda: stock(folder, torch.bfloat16),
    }
    for budget in BUDGETS:
        found |= {
            f"ONNX Runtime fp32, {budget}": partial(onnx, folder, False, scratch, budget),
            f"ONNX Runtime int8, {budget}": partial(onnx, folder, True, scratch, budget),
            f"OpenVINO fp32, {budget}": partial(openvino, folder, "f32", budget),
            f"OpenVINO bf16, {budget}": partial(openvino, folder, "bf16", budget),
        }
    return found


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def texts_of(data: str | None, count: int) -> list[str]:
    if data is None:
        return [text for text in docstrings(4 * count) if text][:count]
    rows = (row.values for row in itertools.islice(read_rows(data), count))
    return [" ".join(filter(None, (row.get("title"), row["text"]))) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="or bert-base, modernbert: random weights")
    parser.add_argument(
        "--data", help="texts (a column text, maybe title); without it docstrings of installed packages"
    )
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", nargs="+", default=[""], help="only contenders whose name holds one of these")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    texts = texts_of(args.data, args.texts)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(find(model_folder(args.model, Path(scratch))))
        wanted = stock(folder, torch.float32)(texts)
        model, _ = load_embedder(folder)
        tokens = sum(map(len, model.tokenizer(texts, truncation=True, max_length=model.max_seq_length)["input_ids"]))
        print(f"{len(texts):,} texts, {tokens:,} tokens, {torch.get_num_threads()} threads, bf16 hardware: "
              f"{has_bf16(torch.device('cpu'))}, torch {torch.__version__}")  # fmt: skip
        ready, found = {}, {}
        for name, make in contenders(folder, Path(scratch)).items():
            if not any(part in name for part in args.only):
                continue
            try:
                ready[name] = make()
                ready[name](texts[:64])
            except Exception as error:  # noqa: BLE001 - a contender that does not run here is named, not judged
                print(f"left out: {name} ({type(error).__name__}: {str(error).splitlines()[0][:90]})")
                ready.pop(name, None)
        seconds: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(args.runs):
            for name, encode in ready.items():
                start = time.perf_counter()
                found[name] = encode(texts)
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, times in seconds.items():
        median, near = statistics.median(times), cosines(wanted, found[name])
        rows.append({"name": name, "tokens_per_second": tokens / median, "worst_cosine": float(near.min()),
                     "mean_cosine": float(near.mean()), "seconds": times})  # fmt: skip
        print(f"{name:<28} {len(texts) / median:9,.1f} texts/s {tokens / median:10,.0f} tokens/s   "
              f"cosine: worst {near.min():.6f} mean {near.mean():.6f}   "
              f"runs {min(times):.2f} to {max(times):.2f} s")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
