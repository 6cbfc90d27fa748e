"""Claim: an exported model gives the model's vectors without torch, and int8 keeps nDCG@10 within half a point.

Every form is exported through its gate, then embeds the same texts from its folder alone, in alternating runs, beside
sentence-transformers and embedtune. Worst and mean cosine are to sentence-transformers' fp32 vectors.

    python benchmarks/export.py --data scifact [--texts 1000] [--runs 3] [--threads 2] [--only onnx] [--no-dev]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from embedtune.encoder.encode import open_encoder
from embedtune.encoder.load import find
from embedtune.parts import open_judged
from embedtune.refine.erase import Texts
from embedtune.refine.export import Wanted, export
from encode import cosines, ours, stock, texts_of

FORMS = ("onnx", "onnx-int8", "openvino", "static")
Encode = Callable[[list[str]], np.ndarray]


def exported(form: str, model: str, corpus: str, dev: object, out: Path) -> Encode:
    """Export, say what the gate found, and embed from the folder."""
    start = time.perf_counter()
    # A static model loses more than any limit; what it loses is the figure that is wanted.
    made = export(model, Wanted(form), out, texts=Texts(corpus, rows=20_000), dev=dev)
    print(f"{form}: exported and compared in {time.perf_counter() - start:.0f} s", *made.lines(), sep="\n    ")
    return open_encoder(str(out)).encode


def openvino_as_it_comes(folder: Path) -> Encode:
    """The same folder without the hint for float32: bf16 where the processor has it."""
    import openvino

    encoder = open_encoder(str(folder))
    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU",
                                             {"INFERENCE_NUM_THREADS": torch.get_num_threads()})  # fmt: skip

    def run(rows: list[list[int]]) -> np.ndarray:
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = row, 1
        return compiled({"input_ids": ids, "attention_mask": mask})[0]

    encoder.run = run
    return encoder.encode


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="a BEIR folder with a dev split")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", default="", help="only forms and peers whose name holds this")
    parser.add_argument("--no-dev", action="store_true", help="speeds and cosines alone")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    corpus = str(Path(args.data) / "corpus.jsonl")
    folder, texts = find(args.model), texts_of(corpus, args.texts)
    dev = None if args.no_dev else open_judged(f"{args.data}:dev")
    print(f"{len(texts):,} texts, {torch.get_num_threads()} threads, torch {torch.__version__}")
    wanted = stock(folder, torch.float32)(texts)
    with tempfile.TemporaryDirectory() as scratch:
        ready: dict[str, Encode] = {
            "sentence-transformers fp32": stock(folder, torch.float32),
            "embedtune fp32": ours(folder, "fp32"),
        }
        for form in FORMS:
            if args.only in form:
                ready[form] = exported(form, args.model, corpus, dev, Path(scratch) / form)
        if "openvino" in ready:
            ready["openvino, no hint"] = openvino_as_it_comes(Path(scratch) / "openvino")
        ready = {name: encode for name, encode in ready.items() if args.only in name}
        for encode in ready.values():
            encode(texts[:32])
        seconds: dict[str, list[float]] = {name: [] for name in ready}
        found = {}
        for _ in range(args.runs):
            for name, encode in ready.items():
                start = time.perf_counter()
                found[name] = encode(texts)
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        same = found[name].shape == wanted.shape and name != "static"
        near = cosines(wanted, found[name]) if same else np.array([np.nan])
        print(f"{name:<28} {len(texts) / statistics.median(times):9,.1f} texts/s   cosine: worst {near.min():.6f} "
              f"mean {near.mean():.6f}   runs {min(times):.2f} to {max(times):.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
