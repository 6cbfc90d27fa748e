import json
import shutil
import socket
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForMaskedLM

from conftest import KINDS, tiny_tokenizer, tokenizer_text
from embedtune.encoder import load, scratch, varlen
from embedtune.errors import UserError


@pytest.fixture
def copy(tiny_model, tmp_path):
    """copy(kind) -> a model folder of the test's own."""

    def make(kind="bert"):
        return shutil.copytree(tiny_model(kind), tmp_path / kind)

    return make


def refused(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        load.load_mlm(folder, 0)
    assert caught.value.where
    return caught.value


def test_the_network_is_blocked():
    with pytest.raises(AssertionError, match="wanted to connect"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)


def changed_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder_that_is_no_model(tmp_path):
    refused(tmp_path, "has no config.json")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "names no model_type")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "cannot be read as JSON")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused(tmp_path, "has no model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_not_opened(copy, name):
    folder = copy()
    (folder / "model.safetensors").rename(folder / name)
    error = refused(folder, "only as .*, a format that can run code")
    assert name in error.what and "safetensors" in error.fix


def test_code_in_a_folder_is_not_run(copy):
    folder = copy()
    canary = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass C: pass\n")
    changed_config(folder, auto_map={"AutoModelForMaskedLM": "evil.C", "AutoConfig": "evil.C"})
    refused(folder, "auto_map")
    changed_config(folder, auto_map=None)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.C", None]}}))
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    try:
        load.load_mlm(folder, 0)
    except UserError as error:
        assert "tokenizer" in str(error)
    assert not canary.exists()


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_damaged_weights(copy, keep):
    path = copy() / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    refused(path.parent, "is damaged")


def test_a_header_that_promises_the_moon(copy):
    path = copy() / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(path.parent, "is damaged")


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_missing_encoder_weights(copy):
    folder = copy()
    edit(folder, lambda t: t.pop("bert.encoder.layer.1.output.dense.weight"))
    error = refused(folder, "1 missing or of another shape")
    assert "bert.encoder.layer.1.output.dense.weight" in error.details


def test_weights_of_another_shape(copy):
    folder = copy()
    name = "bert.encoder.layer.0.output.dense.weight"
    edit(folder, lambda t: t.update({name: torch.zeros(3, 3)}))
    refused(folder, "cannot be opened|another shape")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(copy, value):
    folder = copy()
    edit(folder, lambda t: t["bert.embeddings.word_embeddings.weight"].__setitem__((3, 3), value))
    refused(folder, "word_embeddings.weight has NaN or infinite")


def test_a_tokenizer_bigger_than_the_embedding(copy):
    folder = copy()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["toomany"])
    tokenizer.save_pretrained(folder)
    refused(folder, "has 201 tokens, the model only 200: they do not belong together")


def test_a_tokenizer_that_cannot_be_opened(copy):
    folder = copy()
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer cannot be opened")


def test_a_tokenizer_without_a_mask_token(copy):
    folder = copy()
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)
    refused(folder, "has no mask token")


def test_an_architecture_that_has_no_masked_language_model(copy):
    folder = copy()
    changed_config(folder, model_type="gpt2")
    refused(folder, "cannot be opened as a masked language model")
    changed_config(folder, model_type="nosuchmodel")
    refused(folder, "config.json: cannot be used: .*nosuchmodel")
    changed_config(folder, model_type="bert", hidden_size="many")
    refused(folder, "config.json: cannot be used: .*hidden_size")


@pytest.mark.parametrize("path", ["../outside", "/etc", "1_Pooling/../../outside", None, 3])
def test_module_folders_outside_of_the_model_are_refused(copy, path):
    """They would be copied into the new folder, or over something else."""
    folder = copy("minilm")
    (folder.parent / "outside").mkdir()
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    refused(folder, "names no module folder inside")


@pytest.mark.parametrize("name", ["./absent", "/no/such/folder", "a/b/c"])
def test_a_path_that_is_no_folder_is_not_looked_up_on_the_hub(name):
    with pytest.raises(UserError, match="is not a model folder"):
        load.find(name)


@pytest.mark.parametrize("name", ["somebody/some-model", "bert-base-uncased"])
def test_a_hub_name_without_a_hub(name):
    with pytest.raises(UserError, match="not on this machine, and the hub cannot be reached") as caught:
        load.find(name)
    assert "offline" in caught.value.fix


def test_a_name_that_is_none():
    with pytest.raises(UserError, match="neither a folder here nor a model of the hub"):
        load.find("bad name!")


def test_the_offline_packages_weights_are_checked(monkeypatch, tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"not the model it says it is")

    class File:
        name = "model.safetensors"
        locate = staticmethod(lambda: weights)

    monkeypatch.setattr(load.importlib.metadata, "files", lambda package: [File])
    with pytest.raises(UserError, match="do not have the known sha256"):
        load.find("all-MiniLM-L6-v2")


def test_stated_length(copy):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    assert load.stated_length(copy("bert"), tokenizer) == 512
    folder = copy("minilm")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 96}')
    assert load.stated_length(folder, tokenizer) == 96
    tokenizer.model_max_length = 64
    assert load.stated_length(folder, tokenizer) == 64


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_is_the_model_with_nothing_missing(tiny_model, tmp_path, kind):
    """Opened by stock transformers and sentence-transformers: the same logits, states and embeddings as before."""
    folder = tiny_model(kind)
    loaded = load.load_mlm(folder, 0)
    load.save(loaded, tmp_path)
    text = "bade fima lora"
    inputs = loaded.tokenizer(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    for kind_of_model, complete in ((AutoModelForMaskedLM, True), (AutoModel, kind == "minilm")):
        stock, info = kind_of_model.from_pretrained(tmp_path, output_loading_info=True, local_files_only=True)
        missing = {name for name in info["missing_keys"] if complete or "pooler" not in name}
        assert not missing and not info["mismatched_keys"]
        stock.eval()
        with torch.no_grad():
            found = stock(**inputs)[0]
            if complete and kind_of_model is AutoModelForMaskedLM and not loaded.fresh:
                original = AutoModelForMaskedLM.from_pretrained(folder).eval()
                torch.testing.assert_close(found, original(**inputs)[0], atol=1e-5, rtol=1e-5)
            if kind_of_model is AutoModel:
                original = AutoModel.from_pretrained(folder).eval()
                torch.testing.assert_close(found, original(**inputs)[0], atol=1e-5, rtol=1e-5)
    before = SentenceTransformer(str(folder), device="cpu").encode([text, "ba"])
    after = SentenceTransformer(str(tmp_path), device="cpu").encode([text, "ba"])
    np.testing.assert_allclose(after, before, atol=1e-5)
    config, was = (json.loads((f / "config.json").read_text()) for f in (tmp_path, folder))
    for name in load.ATTENTION_DROPOUT:
        assert config.get(name) == was.get(name)  # switched off for training only
    assert not [name for name in config if name.startswith("_")]


def test_a_pooler_that_is_not_used_is_kept_bit_for_bit(tiny_model, tmp_path):
    loaded = load.load_mlm(tiny_model("minilm"), 0)
    load.save(loaded, tmp_path)
    before = load_file(tiny_model("minilm") / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        assert torch.equal(before[name], after["bert." + name])
    stock, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(stock.pooler.dense.weight, before["pooler.dense.weight"])


def test_saving_twice_gives_the_same_bytes(tiny_model, tmp_path):
    loaded = load.load_mlm(tiny_model("roberta"), 0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        load.save(loaded, tmp_path / name)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(names) >= 6
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_model_from_scratch_opens(tmp_path, kind, monkeypatch):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setitem(scratch.KINDS, kind, {**scratch.KINDS[kind], **small})
    scratch.make(kind, ["bade fima lora " * 5] * 20, 200, 3, tmp_path / "m")
    loaded = load.load_mlm(tmp_path / "m", 0)
    assert not loaded.fresh and loaded.padded is None and loaded.model.config.vocab_size == len(loaded.tokenizer)
    scratch.make(kind, ["bade fima lora " * 5] * 20, 200, 3, tmp_path / "n")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (tmp_path / "n" / "model.safetensors").read_bytes()


def test_the_same_text_gives_the_same_tokenizer():
    """The library's own training does not: it depends on the order of a hash table."""
    tokenizers = [scratch.train_wordpiece(tokenizer_text().splitlines(), 250) for _ in range(4)]
    assert len({t.backend_tokenizer.to_str() for t in tokenizers}) == 1
    tokenizer = tokenizers[0]
    assert tokenizer.convert_ids_to_tokens(range(5)) == scratch.SPECIAL and len(tokenizer) == 250
    assert set(tokenizer.added_tokens_encoder) == set(scratch.SPECIAL)
    ids = tokenizer(tokenizer_text()[:2000])["input_ids"]
    assert tokenizer.unk_token_id not in ids and (ids[0], ids[-1]) == (2, 3)
    assert tokenizer.tokenize("##a [MASK]") == ["[UNK]", "[UNK]", "a", "[MASK]"]
    with pytest.raises(TypeError, match="read twice"):
        scratch.train_wordpiece(iter(["text"]), 200)


def test_configs_that_cannot_be_used_for_scratch(tmp_path):
    for content, words in [
        (None, "names bert, modernbert or a config.json"),
        ('{"hidden_size": 3}', "not a config that can be used"),
        ('{"model_type": "bert", "auto_map": {}}', "not a config that can be used"),
        ('{"model_type": "nosuch"}', "not a config that can be used"),
        ('{"model_type": "gpt2"}', "no masked language model"),
    ]:
        path = tmp_path / "config.json"
        if content:
            path.write_text(content)
        with pytest.raises(UserError, match=words):
            scratch.make(str(path), ["text"] * 9, 200, 0, tmp_path / "m")


def test_collate_is_padded_where_the_model_is(tiny_model):
    rows = [np.array([2, 7, 3]), np.array([2, 3])]
    assert "cu_seq_lens_q" in load.load_mlm(tiny_model("bert"), 0).collate(rows)
    padded = load.load_mlm(tiny_model("mpnet"), 0).collate(rows)
    assert padded["input_ids"].tolist() == [[2, 7, 3], [2, 3, 1]] and set(padded) == set(varlen.pad(rows, 1))


@pytest.mark.parametrize("what", ["AutoModelForMaskedLM", "AutoTokenizer", "AutoConfig"])
def test_a_signal_while_a_model_is_opened_is_no_error_of_the_model(tiny_model, what, monkeypatch):
    import transformers

    from embedtune.errors import Interrupted

    def stop(*args, **kwargs):
        raise Interrupted("stopped by signal 15", 143)

    monkeypatch.setattr(getattr(transformers, what), "from_pretrained", stop)
    with pytest.raises(Interrupted, match="stopped by signal 15"):
        load.load_mlm(tiny_model("bert"), 0)


def test_a_signal_while_an_embedding_model_is_opened_is_no_error_of_the_model(tiny_model, monkeypatch):
    import sentence_transformers

    from embedtune.encoder.embedder import load_embedder
    from embedtune.errors import Interrupted

    def stop(*args, **kwargs):
        raise Interrupted("stopped by signal 15", 143)

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", stop)
    with pytest.raises(Interrupted):
        load_embedder(tiny_model("minilm"))
