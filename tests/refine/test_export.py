import copy
import json
import shutil

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer
from torch import nn

from embedtune import UserError, cli
from embedtune.commands import judge_heads
from embedtune.encoder.encode import identity, open_encoder
from embedtune.refine import export as module
from embedtune.refine import graph, parity
from embedtune.refine.erase import Texts
from embedtune.refine.export import Wanted, export
from embedtune.serve.model import open_served

pytest.importorskip("onnxscript")
KINDS = ("bert", "modernbert", "roberta", "mpnet")


@pytest.fixture(scope="module")
def pipelines(tiny_model, tmp_path_factory):
    """pipelines("bert", "cls") -> a sentence-transformers folder of a tiny model: pooled, erased by a Dense, unit."""

    def make(kind: str, pooling: str, dense: bool = False):
        folder = tmp_path_factory.mktemp("pipelines") / f"{kind}-{pooling}"
        stages = [Transformer(str(tiny_model(kind)), max_seq_length=48), Pooling(32, pooling)]
        if dense:
            stages.append(Dense(32, 24, activation_function=nn.Identity()))
        SentenceTransformer(modules=[*stages, Normalize()], device="cpu").save(str(folder))
        return folder

    return make


@pytest.fixture(autouse=True)
def few_texts(monkeypatch, text_file):
    """Docstrings of the machine take seconds to find; every export here is compared on the same forty lines."""
    lines = [line for line in text_file.read_text().splitlines() if line][:40]
    monkeypatch.setattr(module, "docstrings", lambda most: iter(lines))


@pytest.fixture(scope="module")
def texts(text_file):
    """Texts of many lengths: none, one letter, and more than a model reads."""
    lines = [line for line in text_file.read_text().splitlines() if line][:60]
    return [*lines, "", "b", " ".join(lines)]


@pytest.fixture(scope="module")
def onnx(pipelines, text_file, tmp_path_factory):
    """A tiny BERT, mean pooled, and its export."""
    source, out = pipelines("bert", "mean"), tmp_path_factory.mktemp("onnx") / "out"
    return source, export(str(source), Wanted("onnx"), out, texts=Texts(str(text_file))).folder


def by_onnxruntime(folder, texts, name="model.onnx"):
    """What a consumer does: tokenizers and onnxruntime, nothing else."""
    import onnxruntime

    rows = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    given = {"input_ids": [r.ids for r in rows], "attention_mask": [r.attention_mask for r in rows]}
    session = onnxruntime.InferenceSession(folder / name)
    return session.run(None, {key: np.array(value, np.int64) for key, value in given.items()})[0]


def by_openvino(folder, texts):
    import openvino

    rows = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    given = {"input_ids": [r.ids for r in rows], "attention_mask": [r.attention_mask for r in rows]}
    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({key: np.array(value, np.int64) for key, value in given.items()})[0]


@pytest.mark.parametrize(("kind", "pooling", "dense"), list(zip(KINDS, ("cls", "mean", "lasttoken", "mean"),
                                                                (True, False, False, True))))  # fmt: skip
def test_a_graph_gives_the_vectors_of_sentence_transformers(pipelines, texts, tmp_path, kind, pooling, dense):
    source = pipelines(kind, pooling, dense)
    made = export(str(source), Wanted("onnx"), tmp_path / "out")
    wanted = SentenceTransformer(str(source), device="cpu").encode(texts)
    assert made.parity.near.difference <= 1e-5
    for some in (slice(None), slice(0, 1), slice(61, 62), slice(5, 9)):  # all, alone, one token, a few
        np.testing.assert_allclose(by_onnxruntime(made.folder, texts[some]), wanted[some], rtol=0, atol=1e-5)
    np.testing.assert_allclose(open_encoder(str(made.folder)).encode(texts), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_openvino_reads_its_folder(pipelines, texts, tmp_path, kind):
    pytest.importorskip("openvino")
    source = pipelines(kind, "mean")
    made = export(str(source), Wanted("openvino"), tmp_path / "out")
    wanted = SentenceTransformer(str(source), device="cpu").encode(texts)
    np.testing.assert_allclose(by_openvino(made.folder, texts), wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(open_encoder(str(made.folder)).encode(texts), wanted, rtol=0, atol=1e-5)
    assert not (made.folder / "model.onnx").exists()


def test_a_matryoshka_model_is_cut_and_normalised_inside(pipelines, texts, tmp_path):
    source = pipelines("bert", "mean")
    made = export(str(source), Wanted("onnx", dims=8), tmp_path / "out")
    wanted = SentenceTransformer(str(source), device="cpu").encode(texts, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(by_onnxruntime(made.folder, texts), wanted, rtol=0, atol=1e-5)
    assert made.about["dimension"] == open_encoder(str(made.folder)).dimension == 8


def test_a_model_that_says_itself_where_it_is_cut(pipelines, texts, tmp_path):
    source = pipelines("bert", "mean")
    model = SentenceTransformer(str(source), device="cpu", truncate_dim=8)
    model.save(str(tmp_path / "cut"))
    made = export(str(tmp_path / "cut"), Wanted("onnx"), tmp_path / "out")
    np.testing.assert_allclose(by_onnxruntime(made.folder, texts), model.encode(texts), rtol=0, atol=1e-5)


def test_int8_is_smaller_and_near(onnx, texts, tmp_path):
    source, whole = onnx
    made = export(str(source), Wanted("onnx-int8"), tmp_path / "out")
    found, wanted = by_onnxruntime(made.folder, texts[:20]), by_onnxruntime(whole, texts[:20])
    assert np.abs(found - wanted).max() > 0
    assert (found * wanted).sum(1).min() > 0.99
    assert (made.folder / "model.onnx").stat().st_size < (whole / "model.onnx").stat().st_size
    assert {path.name for path in made.folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_static_is_read_by_sentence_transformers_and_model2vec_alike(onnx, texts, text_file, tmp_path):
    model2vec = pytest.importorskip("model2vec")
    made = export(str(onnx[0]), Wanted("static", dims=16), tmp_path / "out", texts=Texts(str(text_file)))
    found = SentenceTransformer(str(made.folder), device="cpu").encode(texts)
    assert found.shape == (len(texts), 16)
    strange = [*texts, "~ ¤ ?"]  # unknown tokens
    others = model2vec.StaticModel.from_pretrained(made.folder).encode(strange, max_length=None)
    np.testing.assert_allclose(others[:-1], found, atol=1e-6)
    np.testing.assert_allclose(open_encoder(str(made.folder)).encode(strange), others, atol=1e-6)


def test_a_row_of_the_table_is_the_token_encoded_alone(onnx):
    from embedtune.encoder import embedder
    from embedtune.refine.static import table, token_vectors

    stock = embedder.load_stock(onnx[0])
    tokenizer = Tokenizer.from_str(stock.tokenizer.backend_tokenizer.to_str())
    rows = token_vectors(stock, tokenizer)
    token = tokenizer.encode("be", add_special_tokens=False)
    assert len(token.ids) == 1
    alone = stock.encode("be")
    np.testing.assert_allclose(rows[token.ids[0]] / np.linalg.norm(rows[token.ids[0]]), alone, atol=1e-5)
    assert not rows[stock.tokenizer.all_special_ids].any()
    # With all components and equal weights the table is a rotation: distances of tokens stay.
    real = np.flatnonzero(rows.any(axis=1))
    shares = np.full(len(rows), 1 / len(rows))
    turned, a = table(rows, shares, 32)
    weight = a / (a + shares[0])
    before, after = (np.linalg.norm(x[real[0]] - x[real[1:9]], axis=1) for x in (rows, turned / weight))
    np.testing.assert_allclose(after, before, rtol=1e-4)


def test_export_json_says_what_was_exported(onnx):
    source, folder = onnx
    about = json.loads((folder / "export.json").read_text())
    assert about["model_sha256"] == identity(str(source))
    assert (about["to"], about["pooling"], about["max_length"], about["dimension"]) == ("onnx", "mean", 48, 32)
    assert about["inputs"] == ["input_ids", "attention_mask"]
    assert about["parity"]["near"]["difference"] <= 1e-5
    assert {"torch", "onnxruntime", "onnx"} <= about["versions"].keys()


def test_prompts_go_along(tiny_model, texts, tmp_path):
    model = SentenceTransformer(str(tiny_model("minilm")), device="cpu", prompts={"query": "ba be ", "document": ""})
    model.save(str(tmp_path / "prompted"))
    made = export(str(tmp_path / "prompted"), Wanted("onnx"), tmp_path / "out")
    assert made.about["prompts"] == {"query": "ba be ", "document": "", "text": ""}
    encoder = open_encoder(str(made.folder))
    np.testing.assert_allclose(encoder.encode(texts, "query"), model.encode_query(texts), rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(texts, "document"), model.encode_document(texts), rtol=0, atol=1e-5)


def test_texts_that_are_cut_are_counted(onnx, texts):
    encoder = open_encoder(str(onnx[1]))
    encoder.encode(texts)
    assert encoder.truncated == 1


@pytest.mark.parametrize("fault", [0.01, np.nan])
def test_a_bad_export_is_refused_and_leaves_nothing(onnx, tmp_path, monkeypatch, capsys, fault):
    """An exporter that makes a graph of a slightly other model: the gate sees what a consumer would see."""
    write = graph.write_onnx

    def wrong(pipeline, folder):
        other = copy.deepcopy(pipeline)
        other.stages[0].model.embeddings.LayerNorm.bias.data[3] += fault
        write(other, folder)

    monkeypatch.setattr(graph, "write_onnx", wrong)
    assert cli.run(["refine", "export", str(onnx[0]), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "the export is refused: its vectors differ by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dev_set_refuses_what_loses_too_much(onnx, tmp_path, capsys):
    rows = [{"anchor": f"ba be {i}", "positive": f"be bi {i}"} for i in range(6)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)) + "\n")
    flags = ["refine", "export", str(onnx[0]), "--to", "onnx", "--dev", str(pairs)]
    assert cli.run([*flags, "--out", str(tmp_path / "good"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parity"]["dev"]["measure"] == "nDCG@10"
    assert said["parity"]["dev"]["after"] == pytest.approx(said["parity"]["dev"]["before"], abs=1e-3)
    # Nothing can gain a whole point on top: then even an equal model loses too much.
    assert cli.run([*flags, "--out", str(tmp_path / "bad"), "--loss", "-1.1"]) == 2
    assert "nDCG@10 falls by" in capsys.readouterr().err
    assert not list(tmp_path.glob("bad*"))
    assert cli.run([*flags[:-2], "--out", str(tmp_path / "bad"), "--loss", "0.1"]) == 2
    assert "--loss" in capsys.readouterr().err


def test_nearness_counts_neighbours_and_forgives_ties():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 8)).astype(np.float32)
    turned = x @ np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    assert parity.nearness(x, x).difference == 0 and parity.nearness(x, x).neighbours == 1
    assert parity.nearness(x, turned).neighbours == 1  # other axes, the same neighbours
    assert parity.nearness(x, rng.normal(size=(40, 8)).astype(np.float32)).neighbours < 0.5
    twice = np.concatenate([x[:3]] * 8)  # every text has seven equals: whichever is named is right
    assert parity.nearness(twice, twice[::-1][::-1] + rng.normal(scale=1e-7, size=twice.shape)).neighbours == 1
    assert parity.nearness(x, np.full_like(x, np.nan)).neighbours == 0


@pytest.mark.parametrize("to", parity.LIMITS)
@pytest.mark.parametrize("count", [51, 200])
def test_random_vectors_pass_no_gate(to, count):
    rng = np.random.default_rng(count)
    one, other = (rng.normal(size=(count, 24)).astype(np.float32) for _ in range(2))
    found = parity.nearness(one, other[:, :16] if to == "static" else other)
    assert parity.Parity(found, None, parity.LIMITS[to]).faults()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"damaged"), "model.onnx has 7 bytes"),
        (lambda folder: (folder / "export.json").write_text("{}"), "is damaged: export.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
)
def test_a_damaged_export_is_not_opened(onnx, tmp_path, change, says):
    folder = shutil.copytree(onnx[1], tmp_path / "copy")
    change(folder)
    with pytest.raises(UserError, match=says):
        open_encoder(str(folder))


def test_what_cannot_be_exported_is_said_before_any_work(onnx, tiny_model, tmp_path, monkeypatch):
    source, folder = onnx
    out = tmp_path / "out"
    with pytest.raises(UserError, match="from 1 to 32"):
        export(str(source), Wanted("onnx", dims=33), out)
    with pytest.raises(UserError, match="is an export already"):
        export(str(folder), Wanted("onnx"), out)
    with pytest.raises(UserError, match="its arithmetic and its pooling are fixed"):
        open_encoder(str(folder), precision="bf16")
    head = shutil.copytree(tiny_model("bert"), tmp_path / "head")
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(UserError, match="only embedding models"):
        export(str(head), Wanted("onnx"), out)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnxruntime, onnx, onnxscript\n.*pip install 'embedtune\[onnx\]'"):
        export(str(source), Wanted("onnx-int8"), out)
    with pytest.raises(UserError, match=r"embedtune\[openvino\]"):
        export(str(source), Wanted("openvino"), out)
    assert not out.exists()


def test_a_prompt_outside_of_the_pooling_is_refused(pipelines, tmp_path):
    model = SentenceTransformer(str(pipelines("bert", "mean")), device="cpu", prompts={"query": "ba "})
    model[1].include_prompt = False
    model.save(str(tmp_path / "instructed"))
    with pytest.raises(UserError, match="leaves its prompt out"):
        export(str(tmp_path / "instructed"), Wanted("onnx"), tmp_path / "out")


def test_an_export_embeds_in_its_own_arithmetic_and_is_not_served(onnx, texts, tmp_path, monkeypatch):
    source, folder = onnx
    monkeypatch.setattr("embedtune.encoder.encode.fast_precision", lambda device: "bf16")
    (tmp_path / "t.txt").write_text("\n".join(texts[:20]) + "\n")
    assert cli.run(["embed", str(folder), str(tmp_path / "t.txt"), "--out", str(tmp_path / "v.npy")]) == 0
    expected = SentenceTransformer(str(source), device="cpu").encode(texts[:20])
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)
    with pytest.raises(UserError, match="or an export"):
        open_served(str(folder), "bf16", 64)


def test_judge_takes_an_export_for_an_embedding_model(onnx):
    assert not judge_heads.has_heads([str(folder) for folder in onnx])
