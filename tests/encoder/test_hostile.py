"""Model folders that mean harm: nothing in them runs, nothing is fetched, nothing from outside gets into results."""

import json
import shutil
import signal
import socket

import hostile
import numpy as np
import pytest
from hostile import MODELS, SECRET, WHERE

from conftest import corpus
from embedtune import cli, files
from embedtune.encoder import embedder, heads, load
from embedtune.encoder.encode import open_encoder
from embedtune.errors import UserError

WORDS = "the words of a secret that lies beside the model"
# How many of the five ways to open a folder refuse it, where not at least four do: there is no harm in the rest, which
# never reads what is bad (a module of the embedding model, say), or reads it as data.
LEAST = {
    "activation that is a function": 2,
    "activation that loads": 2,
    "layers of another kind": 2,
    "pooling of nothing": 2,
    "a similarity of its own": 0,
    "pickle beside": 0,
    "a template": 0,
    "a template in a file": 0,
    "a tokenizer class of its own": 0,
    "a processor of its own": 0,
    "vocabulary by a path": 0,
    "a length of 10^18": 0,
    "a length of words, of the tokenizer": 0,
    "tokenizer with a slow pattern": 0,
}
SECONDS = 40  # after which a model that hangs is a failure, and not a test that never ends


@pytest.fixture
def armed(tiny_model, tmp_path, monkeypatch):
    """arm(spoil) -> a model folder that was spoiled, beside a secret; any use of the network is a failure."""
    monkeypatch.setenv(WHERE, str(tmp_path / "canary"))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / SECRET).write_text(WORDS)
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(files, "_fsync", lambda path: None)

    def hung(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)

    def arm(spoil, name="model"):
        folder = tmp_path / "work" / name
        shutil.copytree(tiny_model("minilm"), folder)
        spoil(folder)
        return folder

    yield arm
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not (tmp_path / "canary").exists(), "something of the folder ran"
    assert not asked, "something was to be fetched"


def saved(folder):
    """Open it for training, and save it."""
    load.save(load.load_mlm(folder, 0), made(folder, "saved"))


def resaved(folder):
    """Open it for embedding, and save it."""
    opened = embedder.load_trainable(folder)
    embedder.save_embedder(opened.model, made(folder, "resaved"), opened.config_values)


def embedded(folder):
    vectors = open_encoder(str(folder)).encode(["bade fima", "lora"])
    assert np.isfinite(vectors).all()


def given_a_head(folder):
    loaded = heads.load_head(folder, heads.SEQUENCE, 0, ("a", "b"), pooling=heads.usual_pooling(folder))
    load.save(loaded, made(folder, "head"))


def named(folder):
    embedder.identity(folder)
    load.has_mlm_head(folder)
    load.stated_length(folder, load.load_tokenizer(folder))


def made(folder, name):
    out = folder.parent / name
    out.mkdir()
    return out


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_model_that_means_harm_comes_through(armed, name):
    folder = armed(MODELS[name])
    refused = 0
    for call in (named, embedded, resaved, saved, given_a_head):
        try:
            call(folder)
        except UserError as error:
            assert error.where and len(str(error).splitlines()) <= 6
            refused += 1
    assert refused >= LEAST.get(name, 4), "it was opened"
    for out in ("saved", "resaved", "head"):
        for path in (folder.parent / out).rglob("*"):
            assert not path.is_symlink() and (path.is_dir() or WORDS.encode() not in path.read_bytes())


SOME = [
    "auto_map",
    "an attention from the hub",
    "pickle beside other weights",
    "weights through a link",
    "weights of NaN",
]
COMMANDS = [
    ["fit", "mlm", "text.txt", "--model", "model"],
    ["fit", "classify", "labels.csv", "--model", "model"],
    ["fit", "contrastive", "pairs.jsonl", "--model", "model"],
    ["judge", "model", "--data", "pairs.jsonl"],
    ["judge", "good", "model", "--data", "pairs.jsonl"],
    ["embed", "model", "text.txt", "--out", "v.npy"],
    ["predict", "model", "text.txt"],
    ["search", "index", "text.txt", "--model", "model", "--out", "idx"],
    ["refine", "length", "model", "--data", "text.txt"],
    ["refine", "merge", "good", "model", "--coefficient", "0.5", "--out", "merged"],
    ["refine", "export", "model", "--to", "static", "--out", "exported", "--data", "text.txt"],
    ["refine", "reduce", "model", "--data", "text.txt", "--to", "4", "--out", "reduced"],
    ["data", "mine", "pairs.jsonl", "--model", "model", "--out", "mined.jsonl"],
    ["run", "text.txt", "--model", "model", "--out", "ran"],
]


@pytest.mark.parametrize("name", SOME)
def test_commands_refuse_them_and_leave_nothing(armed, monkeypatch, capfd, name):
    folder = armed(MODELS[name])
    monkeypatch.chdir(folder.parent)
    armed(lambda folder: None, "good")
    prepared(folder.parent)
    before = {path.name for path in folder.parent.iterdir()}
    wrong = {}
    for argv in COMMANDS:
        code = cli.run(argv)
        said = "".join(capfd.readouterr())
        if code != 2 or "Traceback" in said or {path.name for path in folder.parent.iterdir()} != before:
            wrong[" ".join(argv)] = (code, said[-300:])
    assert not wrong


def prepared(home):
    lines = [line for line in corpus(60).splitlines() if len(line.split()) > 3]
    (home / "text.txt").write_text("\n".join(lines))
    (home / "labels.csv").write_text(
        "text,label\n" + "".join(f"{line},{'ab'[n % 2]}\n" for n, line in enumerate(lines))
    )
    rows = [{"anchor": a, "positive": b} for a, b in zip(lines, lines[1:])]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- pickles given as data, and in the places of files of our own

PICKLES = {"pickle": hostile.pickled, "torch": hostile.zipped, "objects": hostile.objects, "code": hostile.code}
NAMES = [
    *(
        "a.txt",
        "a.jsonl",
        "a.csv",
        "a.tsv",
        "a.parquet",
        "a.conll",
        "a.txt.gz",
        "a.jsonl.zst",
        "a.bin",
        "a.pt",
        "a.npy",
    ),
    *("a.npz", "a.pkl", "a.safetensors", "optimizer.pt", "a.toml"),
]


def beside_a_model(armed, monkeypatch, kind):
    """A sound model folder with data beside it, as the working folder, and the bytes of a pickle or of code."""
    folder = armed(lambda folder: None)
    monkeypatch.chdir(folder.parent)
    prepared(folder.parent)
    content = PICKLES[kind]()
    return folder, content.encode() if isinstance(content, str) else content


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_given_as_data_do_not_run(armed, monkeypatch, capfd, kind):
    """64 files, whatever they are called, to every command that takes a file and needs no training."""
    folder, content = beside_a_model(armed, monkeypatch, kind)
    wrong = {}
    for name in NAMES:
        (folder.parent / name).write_bytes(content)
        for argv in (
            ["data", "check", name, "--model", "model"],
            ["data", "clean", name, "--out", "new.jsonl"],
            ["data", "pairs", name, "--out", "new.jsonl"],
            ["fit", "mlm", name, "--model", "model"],
            ["fit", "classify", name, "--model", "model"],
            ["judge", "model", "--data", name],
            ["embed", "model", name, "--out", "v.npy"],
            ["search", "query", name, "words"],
        ):
            code = cli.run(argv)
            said = "".join(capfd.readouterr())
            if (code != 2 and not (kind == "code" and code == 0)) or "Traceback" in said:
                wrong[" ".join(argv)] = (code, said[-300:])
            for made_by_it in ("new.jsonl", "v.npy", "v.npy.json"):
                (folder.parent / made_by_it).unlink(missing_ok=True)
    assert not wrong


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_in_the_places_of_our_own_files_do_not_run(armed, monkeypatch, capfd, kind):
    """In an index whose sums were made right, and beside a model: length direction, erasure, checkpoint."""
    from embedtune.search import store
    from embedtune.search.index import create
    from embedtune.search.rows import Record

    folder, content = beside_a_model(armed, monkeypatch, kind)
    index = create(
        folder.parent / "idx", str(folder), [Record(str(n), f"bade {n}", {}) for n in range(9)], dtype="int8"
    )
    manifest = index.manifest
    names = [*manifest.files, "deleted.npy"]
    for name in names:
        path = folder.parent / "idx" / name
        own = path.read_bytes() if path.is_file() else None
        path.write_bytes(content)
        entry = {"sha256": files.sha256(path), "bytes": len(content)}
        spoiled = {**store.asdict(manifest), "files": {**manifest.files, name: entry}}
        if own is None:
            spoiled["deleted"] = name
        files.write_json(folder.parent / "idx" / store.MANIFEST, spoiled)
        assert cli.run(["search", "query", "idx", "bade"]) in (
            (0, 2) if "manifest" in name or "lexical" in name else (2,)
        ), name
        assert "Traceback" not in "".join(capfd.readouterr()), name
        path.write_bytes(own) if own is not None else path.unlink()
    for name in ("length_direction.npy", "erasure.safetensors", "export.json", "recipe.toml", "run.json"):
        (folder / name).write_bytes(content)
    for argv in (
        ["refine", "certify", "model", "--data", "labels.csv"],
        ["fit", "mlm", "text.txt", "--continue-from", "model"],
    ):
        assert cli.run(argv) == 2
        assert "Traceback" not in "".join(capfd.readouterr()), argv
