"""embedtune data augment: every kind in one run, what is said, and what is refused before anything is written."""

import json

import pytest

from conftest import corpus
from embedtune import cli
from embedtune.data.labels import read_labelled
from embedtune.data.read import read_rows
from service import serve

LINES = [line for line in corpus(300, seed=8).splitlines() if line.count(" ") > 5][:16]
ROWS = [{"text": line, "label": ("bad", "good")[n % 2]} for n, line in enumerate(LINES)]


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """call(words, code) -> (stdout, stderr); in a folder of its own with a train.jsonl."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(*argv, code=0):
        capfd.readouterr()
        found = cli.run(["data", "augment", *map(str, argv)])
        out, err = capfd.readouterr()
        assert found == code, err
        assert "Traceback" not in err
        return out, err

    return run


def labels(path):
    return [(row.text, row.labels) for row in read_labelled(path)]


def test_new_rows_have_the_labels_of_their_rows(call, tmp_path):
    out, err = call("train.jsonl", "--out", "more.csv", "--kinds", "swap", "crop", "characters", "--copies", "1")
    assert out.startswith("more.csv: 48 new rows from 16 training rows, 64 rows in all\nkind ") and err == ""
    assert out.count("  before  ") == out.count("  after   ") == 3
    assert "note: only training rows may be augmented, never those of dev or test" in out
    known = {row["text"]: row["label"] for row in ROWS}
    found = [row.values for row in read_rows("more.csv")]
    assert len(found) == 64 and {row["augmented"] for row in found} == {"", "swap", "crop", "characters"}
    assert all(row["label"] == known[ROWS[int(row["source_row"]) - 1]["text"]] for row in found)
    assert [pair[1] for pair in labels("more.csv")] == [(row["label"],) for row in found]


def test_json_and_seeds(call, tmp_path):
    out, _ = call("train.jsonl", "--out", "a.jsonl", "--json", "--seed", "3", "--rate", "0.3")
    told = json.loads(out)
    assert told["new"] == sum(kind["made"] for kind in told["kinds"].values()) and told["written"] == 16 + told["new"]
    assert told["kinds"]["swap"]["asked"] == 32 and told["kinds"]["swap"]["changed"] > 0.1 and "bill" not in told
    call("train.jsonl", "--out", "b.jsonl", "--seed", "3", "--rate", "0.3")
    call("train.jsonl", "--out", "c.jsonl", "--seed", "4", "--rate", "0.3", "--only-new")
    a, b, c = ((tmp_path / name).read_text() for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert a == b and len(set(c.splitlines()) - set(a.splitlines())) > 40
    assert all(json.loads(line)["augmented"] for line in c.splitlines())


def test_counterfactuals_are_made_of_training_rows_alone(call, tmp_path):
    rows = [("She met her brother", "train"), ("He met his sister", "train"), ("He sleeps", "test"), ("Rain", "train")]
    lines = [json.dumps({"text": text, "label": "x", "split": split}) + "\n" for text, split in rows]
    (tmp_path / "people.jsonl").write_text("".join([*lines, json.dumps({"text": "John ran", "label": "y"}) + "\n"]))
    out, _ = call("people.jsonl", "--out", "a.jsonl", "--kinds", "counterfactual", "--copies", "1", "--json")
    told = json.loads(out)["kinds"]["counterfactual"]
    # Each of the first two is the other's counterfactual: it is there already.
    assert told["asked"] == 4 and told["made"] == 1
    assert told["refused"] == {"no gendered word or name": 1, "repeats a row of the file": 2}
    new = [row for row in map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines()) if row["augmented"]]
    assert [(row["source_row"], row["label"], row["text"].split()[1]) for row in new] == [(5, "y", "ran")]


def test_kinds_by_models_and_the_guard(call, tiny_model, tmp_path):
    flags = ["--kinds", "contextual", "swap", "--model", tiny_model("bert")]
    out, _ = call("train.jsonl", "--out", "a.parquet", *flags)
    found = [row.values for row in read_rows("a.parquet")]
    assert {row["augmented"] for row in found} == {None, "contextual", "swap"}
    free = out.splitlines()[0]
    guard = ["--guard", "--guard-model", tiny_model("minilm"), "--guard-least", "0.999"]
    out, _ = call("train.jsonl", "--out", "b.parquet", *flags, *guard)
    assert "refused: its meaning is too far from the row's" in out and out.splitlines()[0] != free
    kept = {row.values["text"] for row in read_rows("b.parquet")}
    assert {row["text"] for row in ROWS} < kept < {row["text"] for row in found}


def test_models_that_write_texts(call, tmp_path, monkeypatch):
    from embedtune.enrich import rewrite

    opened = []

    def open_named(name, prefix=""):
        opened.append((name, prefix))
        return name

    def write(writer, texts, keys):
        return [f"{text} {writer}" for text in texts]

    monkeypatch.setattr(rewrite, "open_seq2seq", open_named)
    monkeypatch.setattr(rewrite, "_write", write)
    flags = [
        "--translate",
        "there",
        "back",
        "--paraphraser",
        "other",
        "--prefix",
        "say: ",
        "--copies",
        "1",
        "--only-new",
    ]
    call("train.jsonl", "--out", "a.jsonl", "--kinds", "back-translation", "paraphrase", *flags)
    assert opened == [("there", ""), ("back", ""), ("other", "say: ")]
    found = [row.values for row in read_rows("a.jsonl")]
    ends = {"back-translation": " there back", "paraphrase": " other"}
    assert [row["text"] for row in found if row["source_row"] == 1] == [ROWS[0]["text"] + end for end in ends.values()]
    assert all(row["text"] == ROWS[row["source_row"] - 1]["text"] + ends[row["augmented"]] for row in found)


def test_a_chat_model_is_paid_once(call, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789abcdefSECRET")

    def reply(request):
        text = request["messages"][0]["content"].rpartition("\n")[2]
        content = json.dumps([f"well {text}", f"{text} well"])
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        return {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": usage}

    with serve() as service:
        service.reply = reply
        flags = ["--kinds", "llm", "--address", service.address, "--llm-model", "chat", "--prices", "1", "2"]
        out, err = call("train.jsonl", "--out", "a.jsonl", *flags)
        assert out.startswith("a.jsonl: 32 new rows") and "16 of 16 prompts" in err
        assert "16 texts asked about, 0 taken from a.jsonl.journal: 160 tokens read, 80 written" in out
        assert "in 16 requests, cost 0.0003" in out and "SECRET" not in out + err
        first = (tmp_path / "a.jsonl").read_bytes()
        out, _ = call("train.jsonl", "--out", "a.jsonl", *flags, "--force", "--json")
        assert json.loads(out)["bill"]["resumed"] == 16 and json.loads(out)["bill"]["cost"] == 0
        assert len(service.requests) == 16 and (tmp_path / "a.jsonl").read_bytes() == first


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--kinds", "swp"], ["'swp' is no kind (did you mean 'swap'?)"]),
        (["--rate", "0"], ["--rate: must be above 0 and at most 1, not 0"]),
        (["--kinds", "contextual", "paraphrase"], ["contextual: needs --model", "paraphrase: needs --paraphraser"]),
        (["--kinds", "llm", "--llm-model", "x"], ["--kinds llm: needs --address"]),
        (["--kinds", "back-translation", "--copies", "0"], ["needs --translate", "--copies: must be 1 or more, not 0"]),
        (["--model", "x"], ["--model: is for contextual, which --kinds does not name"]),
        (["--guard", "--guard-least", "2"], ["--guard-least: must be between -1 and 1"]),
        (["--rate", "2", "--columns", "text=txet"], ["--rate: must be", "no column 'txet'"]),
        (["--columns", "text=txet"], ["no column 'txet'"]),
        (["--columns", "text"], ["is not of the form text=NAME"]),
        (["--kinds", "contextual", "--model", "./absent"], ["is not a model folder"]),
        (["--pair"], ["no column 'text_pair'"]),
    ],
)
def test_mistakes_are_said_together_and_nothing_is_written(call, tmp_path, argv, says):
    out, err = call("train.jsonl", "--out", "new.jsonl", *argv, code=2)
    assert out == "" and all(words in err for words in says), err
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_file_that_is_there_is_kept(call, tmp_path):
    _, err = call("train.jsonl", "--out", "train.jsonl", code=2)
    assert "exists already" in err and len((tmp_path / "train.jsonl").read_text().splitlines()) == 16
    _, err = call("absent.jsonl", "--out", "new.jsonl", code=2)
    assert "absent.jsonl" in err
