"""The command line: what a user's mistake looks like, and that help is quick."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import corpus, tiny_tokenizer
from embedtune import cli
from embedtune.errors import Interrupted, UserError, did_you_mean, short_list

SOURCE = Path(__file__).parents[1] / "src"
HEAVY = ("torch", "transformers", "sentence_transformers", "numpy", "matplotlib", "datasets", "scipy")


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    """A folder of the test's own, with text.txt and model/ in it."""
    (tmp_path / "text.txt").write_text(corpus(60))
    shutil.copytree(tiny_model("bert"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded_by(code: str) -> set[str]:
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    code += f"; import sys; print('LOADED', *[m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("LOADED"))
    return set(line.split()[1:])


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import embedtune; embedtune.__version__") == set()
    assert loaded_by("from embedtune import MLM, Loop, UserError; MLM(loop=Loop(lr=1e-5))") == set()


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["fit", "--help"],
        ["fit", "mlm", "--help"],
        ["data", "check", "--help"],
        ["refine", "length", "--help"],
        ["--version"],
    ],
)
def test_help_loads_no_torch(argv):
    loaded = loaded_by(f"from embedtune import cli; assert cli.run({argv!r}) == 0")
    assert not loaded & {"torch", "transformers", "sentence_transformers", "matplotlib", "datasets"}


def test_help_names_every_command_and_flag(capsys):
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.run(["fit", "mlm", "--help"]) == 0
    text = capsys.readouterr().out
    flags = "model out seed lr epochs max-steps minutes batch checkpoint-steps resume dev force discard"
    assert not [flag for flag in flags.split() if f"--{flag}" not in text]
    assert "Peak learning rate of AdamW" in text  # a field's comment is its help


@pytest.mark.parametrize("argv, code", [([], 2), (["fit"], 2), (["fit", "-h"], 0), (["help"], 0), (["-V"], 0)])
def test_words_without_a_command(argv, code, capsys):
    assert cli.run(argv) == code
    assert capsys.readouterr().out


def mistake(capfd, *argv, says, lines=6):
    """Exit 2; one message on stderr, no traceback, nothing left behind."""
    before = set(os.listdir())
    capfd.readouterr()
    assert cli.run(list(argv)) == 2
    out, err = capfd.readouterr()
    assert out == "", out
    for words in [says] if isinstance(says, str) else says:
        assert words in err, err
    assert "Traceback" not in err and "bug of embedtune" not in err
    message = [line for line in err.splitlines() if not line.startswith("reading and tokenising")]
    assert 1 <= len(message) <= lines, err
    assert set(os.listdir()) == before
    return err


def fit(*argv):
    return ["fit", "mlm", *argv, "--model", "model", "--out", "out"]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["fti", "mlm"], "there is no command 'fti mlm' (did you mean 'fit mlm'?)"),
        (["fit", "mml"], "(did you mean 'fit mlm'?)"),
        (["wibble"], "there is no command 'wibble'"),
        (["fit", "mlm"], "no training data is named"),
        (["fit", "mlm", "absent.txt", "--model", "model"], "absent.txt"),
        (["fit", "mlm", "text.txt", "--model", "./nowhere"], "is not a model folder"),
        (["fit", "mlm", "text.txt", "--model", "no/such-model"], "is not on this machine"),
        (["fit", "mlm", "text.txt", "--lr", "7"], "lr must lie between 0 and 1, not 7.0"),
        (["fit", "mlm", "text.txt", "--epochs", "inf"], "epochs must be positive and finite"),
        (["fit", "mlm", "text.txt", "--batch", "0", "--lr", "-1"], ["2 problem(s)", "batch must", "lr must"]),
        (["fit", "mlm", "text.txt", "--model", "model", "--measure", "dev_f1"], "there is no dev measure 'dev_f1'"),
        (["fit", "mlm", "text.txt", "--model", "model", "--columns", "text"], "columns"),
        (["fit", "mlm", "text.txt", "--model", "model", "--max-length", "5000"], "5000 tokens are more than the 128"),
        (["fit", "mlm", "absent.toml"], "absent.toml: cannot be read"),
        (["fit", "mlm", "--resume"], "no training data is named"),
        (["fit", "mlm", "text.txt", "--model", "model", "--resume"], "there is nothing to resume"),
        (["fit", "mlm", "text.txt", "--model", "model", "--resume", "nowhere"], "there is nothing to resume"),
        (["data", "check", "text.txt", "--model", "./nowhere"], "is not a model folder"),
    ],
)  # fmt: skip
def test_mistakes_in_what_is_said(place, capfd, argv, says):
    mistake(capfd, *argv, says=says)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--wibble"], "wibble"),
        (["--learning-rate", "3"], "learning-rate"),
        (["--epochs", "many"], "many"),
        (["--batch", "2.5"], "2.5"),
        (["--schedule", "steep"], "steep"),
        (["--lr"], "lr"),
    ],
)
def test_flags_that_cannot_be_read(place, capfd, argv, says):
    mistake(capfd, *fit("text.txt"), *argv, says=says, lines=30)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("empty.txt", b"", "empty.txt"),
        ("blank.txt", b"\n \n\t\n", "blank.txt"),
        ("one.txt", b"a single line\n", "too few to hold any out"),
        ("binary.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20, "binary.txt"),
        ("zip.txt", b"PK\x03\x04" + bytes(200), "zip archive"),
        ("latin.txt", "schön und gut\n".encode("latin-1") * 40, ["latin.txt, line 1", "UTF-8"]),
        ("utf16.txt", "some text\n".encode("utf-16") * 40, "UTF-16"),
        ("unknown.txt", "☃☃ ☃\n".encode() * 40, "no text that the tokenizer turns into tokens"),
        ("same.txt", b"the same line again\n" * 40, "every row that could be held out"),
        ("what.xyz", b"text\n" * 40, "what.xyz"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n' * 20, "broken.jsonl, line 2"),
        ("table.csv", b"a,b\n1,2\n" * 20, "table.csv"),
    ],
)
def test_mistakes_in_the_data(place, capfd, name, content, says):
    (place / name).write_bytes(content)
    mistake(capfd, *fit(name), says=says)


def spoil_pickle(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def spoil_truncated(model):
    os.truncate(model / "model.safetensors", 1000)


def spoil_garbage(model):
    (model / "model.safetensors").write_bytes(b"not weights at all")


def spoil_missing(model):
    tensors = load_file(model / "model.safetensors")
    tensors.pop("bert.encoder.layer.0.attention.self.query.weight")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def spoil_nan(model):
    tensors = load_file(model / "model.safetensors")
    tensors["bert.encoder.layer.0.attention.self.query.weight"][0, 0] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def spoil_tokenizer(model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"more{n}" for n in range(9)])
    tokenizer.save_pretrained(model)


def spoil_auto_map(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))


def spoil_config(model):
    (model / "config.json").unlink()


def spoil_type(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "wibble"}))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (spoil_pickle, ["a format that can run code", "pytorch_model.bin"]),
        (spoil_truncated, "is damaged"),
        (spoil_garbage, "is damaged"),
        (spoil_missing, ["its weights do not fit its config", "query.weight"]),
        (spoil_nan, "NaN or infinite"),
        (spoil_tokenizer, "they do not belong together"),
        (spoil_auto_map, "auto_map"),
        (spoil_config, "has no config.json"),
        (spoil_type, "wibble"),
    ],
)
def test_mistakes_in_the_model(place, capfd, spoil, says):
    spoil(place / "model")
    mistake(capfd, *fit("text.txt"), says=says)


def test_mistakes_in_the_output(place, capfd):
    (place / "out").mkdir()
    mistake(capfd, *fit("text.txt"), says=["out: exists already", "--force"])
    (place / "out").rmdir()
    (place / "out").write_text("a file")
    mistake(capfd, *fit("text.txt"), says="out: exists already")
    (place / "out").unlink()
    (place / "out.running").mkdir()
    mistake(capfd, *fit("text.txt"), says=["not finished", "--resume continues it, --discard removes it"])
    (place / "out.running").rmdir()
    mistake(capfd, "fit", "mlm", "text.txt", "--model", "model", "--out", "/", says="no name for an output folder")
    mistake(capfd, "fit", "mlm", "text.txt", "--model", "model", "--out", "text.txt/out", says="cannot be made")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc on this system")
def test_an_output_that_cannot_be_written(place, capfd):
    """Also for root, whom no permission stops: nothing can be made in /proc."""
    mistake(capfd, "fit", "mlm", "text.txt", "--model", "model", "--out", "/proc/out", says="cannot be made")


@pytest.mark.parametrize(
    "content, says",
    [
        ("train = ", "is not valid TOML"),
        ('trian = "text.txt"', "unknown key 'trian' (did you mean 'train'?)"),
        ('train = "text.txt"\n[loop]\nepoch = 3', "unknown key 'loop.epoch' (did you mean 'epochs'?)"),
        (
            'train = 3\n[loop]\nlr = "fast"',
            ["2 problem(s)", "'train' must be a text, not 3", "'loop.lr' must be a number"],
        ),
        ('train = "text.txt"\n[loop]\nlr = 3.0', "lr must lie between 0 and 1"),
    ],
)
def test_mistakes_in_a_recipe(place, capfd, content, says):
    (place / "r.toml").write_text(content)
    mistake(capfd, "fit", "mlm", "r.toml", "--model", "model", "--out", "out", says=says)


@pytest.fixture
def no_picture(monkeypatch):
    from embedtune import files, plots

    monkeypatch.setattr(
        plots, "loss_curve", lambda r, stem, title, unit: files.write_bytes(stem.with_suffix(".png"), b"png")
    )


SHORT = ["--max-steps", "2", "--dev-rows", "5", "--precision", "fp32"]


def test_a_run_prints_its_result_on_stdout_and_its_progress_on_stderr(place, capfd, no_picture):
    assert cli.run([*fit("text.txt"), *SHORT]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("measure") and "loss per masked token" in out and "out/ holds the model" in out
    assert "step 2 of 2: dev loss" in err and "held out" in err and "measure" not in err
    assert cli.run([*fit("text.txt"), *SHORT, "--force", "--json"]) == 0
    out, _ = capfd.readouterr()
    found = json.loads(out)
    assert found["folder"] == "out" and found == {
        "folder": "out",
        **json.loads((place / "out/scores.json").read_text()),
    }


def test_flags_go_before_the_recipe_and_the_recipe_before_the_defaults(place, no_picture):
    (place / "r.toml").write_text('train = "text.txt"\nmodel = "model"\n[loop]\nlr = 1e-3\nseed = 4\nbatch = 8\n')
    assert cli.run(["fit", "mlm", "r.toml", "--lr", "2e-3", "--out", "out", *SHORT]) == 0
    text = (place / "out" / "recipe.toml").read_text()
    assert "lr = 0.002\n" in text and "seed = 4\n" in text and "batch = 8\n" in text and 'schedule = "linear"' in text


def test_a_bug_of_ours_is_shown_whole_with_exit_code_1(place, capfd, monkeypatch):
    fails = dataclasses.replace(cli.COMMANDS["fit mlm"], run=lambda command, talk: 1 / 0)
    monkeypatch.setitem(cli.COMMANDS, "fit mlm", fails)
    assert cli.run(fit("text.txt")) == 1
    err = capfd.readouterr().err
    assert "ZeroDivisionError" in err and "this is a bug of embedtune" in err


@pytest.mark.parametrize(
    "error, code, says",
    [
        (Interrupted("stopped; checkpoint x", 143), 143, "stopped; checkpoint x"),
        (KeyboardInterrupt(), 130, "stopped by signal 2"),
        (UserError("what", where="where", fix="fix", details=["a", "b"]), 2, "where: what\n  a\n  b\n  fix: fix\n"),
        (SystemExit(2), 2, ""),
        (SystemExit("words"), 2, ""),
    ],
)
def test_exit_codes(capfd, monkeypatch, error, code, says):
    def fails(command, talk):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fit mlm", dataclasses.replace(cli.COMMANDS["fit mlm"], run=fails))
    assert cli.run(["fit", "mlm"]) == code
    err = capfd.readouterr().err
    assert says in err and "Traceback" not in err


def test_main_exits_with_the_code_of_run():
    with pytest.raises(SystemExit) as caught:
        cli.main(["fti", "mlm"])
    assert caught.value.code == 2


def test_a_reader_that_goes_away_is_no_error():
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    code = "import time, sys; from embedtune import cli; time.sleep(0.3); sys.exit(cli.run(['fit', 'mlm', '--help']))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdout.close()
    error = child.stderr.read()
    assert child.wait() in (0, -signal.SIGPIPE, 120) and "Traceback" not in error


def test_words_of_errors():
    assert short_list([1000, 2, 3]) == "1,000, 2, 3" and short_list(["a"] * 9) == "a, a, a, ..."
    assert did_you_mean("fit mml", ["fit mlm"]) == " (did you mean 'fit mlm'?)" and did_you_mean("x", ["fit mlm"]) == ""
