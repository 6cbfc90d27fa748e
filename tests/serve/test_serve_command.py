import socket

import pytest

pytest.importorskip("fastapi")

from embedtune.cli import run  # noqa: E402
from embedtune.commands.serve import Serve  # noqa: E402
from embedtune.serve.batcher import Limits  # noqa: E402


@pytest.mark.parametrize(("words", "said"), [
    (["--host", "0.0.0.0"], "there is no key"), (["--host", "example.org"], "there is no key"),
    (["--port", "0"], "--port must be 1 to 65535"), (["--batch-tokens", "0"], "--batch-tokens must be above 0"),
    (["--key-file", "/nowhere/key"], "cannot be read"), (["--queue-seconds", "-1"], "--queue-seconds"),
])  # fmt: skip
def test_settings_that_cannot_be(tiny_model, capsys, monkeypatch, words, said):
    monkeypatch.delenv("EMBEDTUNE_API_KEY", raising=False)
    assert run(["serve", str(tiny_model("bert")), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_key_that_is_none(tiny_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "key").write_text("\n")
    assert run(["serve", str(tiny_model("bert")), "--key-file", str(tmp_path / "key")]) == 2
    monkeypatch.setenv("EMBEDTUNE_API_KEY", "short")
    assert run(["serve", str(tiny_model("bert"))]) == 2
    assert "8 printable" in capsys.readouterr().err


def test_a_port_in_use_and_a_model_that_is_not_there(tiny_model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", str(tiny_model("bert")), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err
    assert run(["serve", "no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err


def test_the_limits_of_the_command_are_those_of_the_queue():
    asked, limits = Serve("model"), Limits()
    assert (asked.batch_tokens, asked.queue_seconds, asked.queue_items) == (6144, 2.0, 8192)
    assert (limits.batch_tokens, limits.queue_seconds, limits.queue_items) == (6144, 2.0, 8192)
