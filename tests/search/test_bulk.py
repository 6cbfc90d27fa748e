import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings

from conftest import corpus
from embedtune import cli
from embedtune.encoder import shapes
from embedtune.search import bulk
from embedtune.search.quantise import restored


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    """A folder with a model, text.txt and rows.jsonl, blocks of 50 rows; returns the texts."""
    shutil.copytree(tiny_model("minilm"), tmp_path / "model")
    texts = corpus(230).split("\n")[:-1]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    texts = [text for text in texts if text]
    rows = [json.dumps({"_id": f"doc-{i}", "body": text, "kind": i % 3}) for i, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    return texts


def run(*words, code=0):
    assert cli.run(["embed", "model", *words]) == code


def told(out):
    return json.loads(Path(out + ".json").read_text())


def stock():
    return SentenceTransformer("model", device="cpu", local_files_only=True)


def test_the_vectors_are_those_of_stock_encode_in_the_order_of_the_rows(place, capsys):
    run("rows.jsonl", "--out", "v.parquet", "--columns", "text=body", "--text")
    table = pq.read_table("v.parquet")
    assert table.column("id").to_pylist() == [f"doc-{i}" for i in range(len(place))]
    assert table.column("text").to_pylist() == place
    vectors = np.array(table.column("vector").to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, stock().encode(place), atol=1e-6)
    run("text.txt", "--out", "v.npy")
    np.testing.assert_array_equal(np.load("v.npy"), vectors)
    said = capsys.readouterr()
    assert "28 rows left out: blank" in said.out and "texts/s" in said.err
    about = told("v.npy")
    assert about["rows"] == len(place) and about["dimension"] == 32 and len(about["identity"]) == 64
    assert not list(Path().glob("*.running"))


@pytest.mark.parametrize(("hardware", "said", "made"), [
    ("bf16", [], "bf16"), ("fp32", [], "fp32"), ("bf16", ["--precision", "fp32"], "fp32"),
])  # fmt: skip
def test_the_fast_arithmetic_where_the_hardware_has_it(place, monkeypatch, hardware, said, made):
    monkeypatch.setattr("embedtune.encoder.encode.fast_precision", lambda device: hardware)
    run("text.txt", "--out", "v.npy", *said)
    assert told("v.npy")["precision"] == made
    gap = np.abs(np.load("v.npy") - stock().encode(place)).max()
    assert gap < 1e-6 if made == "fp32" else 1e-6 < gap < 0.05


def test_few_compiled_shapes_are_kept_so_that_memory_does_not_grow(place, monkeypatch):
    for name in shapes.few_shapes():
        monkeypatch.delenv(name, raising=False)
    run("text.txt", "--out", "v.npy")
    assert {name: os.environ[name] for name in shapes.few_shapes()} == shapes.few_shapes()


def test_types_of_numbers(place):
    wanted = stock().encode(place)
    run("text.txt", "--out", "half.npy", "--dtype", "float16")
    assert np.load("half.npy").dtype == np.float16
    np.testing.assert_allclose(np.load("half.npy"), wanted, atol=1e-3)
    run("text.txt", "--out", "bits.parquet", "--dtype", "binary", "--dims", "20")
    bits = np.array(pq.read_table("bits.parquet").column("vector").to_pylist(), np.int8)
    np.testing.assert_array_equal(bits, quantize_embeddings(wanted[:, :20], "binary"))
    run("text.txt", "--out", "whole.npy", "--dtype", "int8")
    about = told("whole.npy")
    ranges = np.array([about["low"], about["high"]], np.float32)
    np.testing.assert_allclose(ranges, [wanted.min(0), wanted.max(0)], atol=1e-6)
    step = (ranges[1] - ranges[0]) / 255
    assert (np.abs(restored(np.load("whole.npy"), ranges) - wanted) <= 0.51 * step + 1e-6).all()
    assert about["outside"] == 0


def test_dims_are_those_of_stock_truncate_dim(place):
    run("text.txt", "--out", "v.npy", "--dims", "7")
    cut = SentenceTransformer("model", device="cpu", local_files_only=True, truncate_dim=7).encode(place)
    np.testing.assert_allclose(np.load("v.npy"), cut, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_shards_together_are_the_whole(place, dtype, monkeypatch):
    monkeypatch.setattr(bulk, "CALIBRATION", 60)
    run("text.txt", "--out", "whole.npy", "--dtype", dtype)
    whole, parts = np.load("whole.npy"), []
    for shard in (1, 2, 3):
        run("text.txt", "--out", f"{shard}.npy", "--dtype", dtype, "--shard", f"{shard}/3")
        part = np.load(f"{shard}.npy")
        parts.append(told(f"{shard}.npy"))
        # Other texts in a batch may change the last bit of a sum, and so a code by one.
        np.testing.assert_allclose(part, whole[shard - 1 :: 3], atol=1e-6 if dtype == "float32" else 1)
    assert sum(part["rows"] for part in parts) == len(whole)
    assert len({json.dumps(part.get("low")) for part in parts}) == 1  # one scale for all of them


def test_roles_and_prompts(place):
    settings = {"prompts": {"query": "ba be ", "document": "di "}, "similarity_fn_name": "cosine"}
    (Path("model") / "config_sentence_transformers.json").write_text(json.dumps(settings))
    model = stock()
    for flags, wanted in (
        (["--role", "query"], model.encode_query(place)),
        (["--role", "document"], model.encode_document(place)),
        (["--prompt", "do da "], model.encode(place, prompt="do da ")),
        ([], model.encode(place)),
    ):
        run("text.txt", "--out", "v.npy", "--force", *flags)
        np.testing.assert_allclose(np.load("v.npy"), wanted, atol=1e-6)


def test_the_encoder_of_a_model_with_a_head_pools_as_it_is_told(place, tiny_model):
    shutil.rmtree("model")
    shutil.copytree(tiny_model("bert"), "model")
    run("text.txt", "--out", "cls.npy", "--pooling", "cls")
    run("text.txt", "--out", "mean.npy")
    model = stock()
    np.testing.assert_allclose(np.load("mean.npy"), model.encode(place), atol=3e-6)  # not scaled to length one
    model[1].pooling_mode = "cls"
    np.testing.assert_allclose(np.load("cls.npy"), model.encode(place), atol=3e-6)


def test_lines_of_stdin(place, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo three\n"))
    run("-", "--out", "v.parquet")
    table = pq.read_table("v.parquet")
    assert table.column("id").to_pylist() == ["1", "3"]
    np.testing.assert_allclose(
        np.array(table.column("vector").to_pylist()), stock().encode(["one", "two three"]), atol=1e-6
    )


def test_long_texts_are_counted(place, capsys):
    Path("long.txt").write_text("ba be bi " * 200 + "\nba\n")
    run("long.txt", "--out", "v.npy")
    assert "1 texts are longer than the model reads" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        (["text.txt", "--out", "v.csv"], "must end in .parquet or .npy"),
        (["text.txt", "--out", "v.npy", "--shard", "3/2"], "from 1 to n"),
        (["text.txt", "--out", "v.npy", "--shard", "half"], "not of the form i/n"),
        (["text.txt", "--out", "v.npy", "--dims", "33"], "from 1 to 32"),
        (["text.txt", "--out", "v.npy", "--dims", "0"], "from 1 to 32"),
        (["text.txt", "--out", "v.npy", "--pooling", "cls"], "says itself how"),
        (["text.txt", "--out", "v.npy", "--resume"], "no unfinished run"),
        (["text.txt", "--out", "v.npy", "--resume", "--discard"], "exclude each other"),
        (["none.txt", "--out", "v.npy"], "cannot be read"),
        (["text.txt", "--out", "there.npy"], "exists already"),
        (["text.txt"], "--out"),
    ],
)
def test_mistakes_leave_nothing_behind(place, capsys, words, says):
    Path("there.npy").write_bytes(b"kept")
    before = sorted(Path().iterdir())
    run(*words, code=2)
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert sorted(Path().iterdir()) == before
    assert Path("there.npy").read_bytes() == b"kept"


def test_memory_does_not_grow_with_the_rows(place, monkeypatch):
    """Ten times the rows: no more blocks are held at once, and none when the next one is made."""
    import weakref

    class Texts(list):  # that can be watched
        pass

    alive, most = weakref.WeakSet(), []
    blocks = bulk._blocks

    def watched(rows):
        for block in blocks(rows):
            kept = Texts(block)
            alive.add(kept)
            del block
            most.append(len(alive))
            yield kept
            del kept

    Texts.__hash__ = object.__hash__
    monkeypatch.setattr(bulk, "_blocks", watched)
    Path("many.txt").write_text("ba be\n" * 2048 * 8)
    run("many.txt", "--out", "v.npy")
    assert np.load("v.npy").shape == (2048 * 8, 32) and len(most) == 8
    assert max(most) <= 4  # the one that is embedded, the one whose tokens are made, and what is about to be handed on
