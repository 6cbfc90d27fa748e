"""The whole story: raw file in, verdict out. Read and part, tune, judge once, write the report.

What the data is decides which story is told: that of raw text and pairs, or that of labels, scores and tags. Every
stage leaves its result under OUT.running, so a run that was stopped or killed goes on at the stage it was in.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedtune import files, limits, schema, tune
from embedtune.errors import EXIT_FINE, EXIT_REGRESSION, Interrupted, UserError
from embedtune.recipes import Run


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a run left: the folder of the model that was kept, and the story that its report tells."""

    folder: Path
    story: dict[str, Any]

    @property
    def code(self) -> int:
        """The exit code: 3 where the verdict is REGRESSION."""
        return EXIT_REGRESSION if self.story["verdict"]["word"] == "REGRESSION" else EXIT_FINE


def run(
    recipe: Run,
    out: str | Path = "embedtune-run",
    *,
    resume: bool = False,
    discard: bool = False,
    force: bool = False,
    listener: Any = None,
) -> Ended:
    """Turn `recipe.data` into a model and a verdict at `out`.

    `resume`, `discard` and `force` are those of `finetune`. The kept model is the best on dev; on raw text judged by
    proxies it is the base unless the verdict is WIN, and after a REGRESSION it is always the base (with labels: the
    untuned encoder, its head at a linear probe). Raises UserError for a user's mistake, Interrupted after SIGINT or
    SIGTERM.
    """
    from embedtune.fit.engine import Listener

    listener = listener or Listener()
    out = Path(out)
    home = tune.running(out) if out.name else out
    found = limits.problems(recipe)
    if isinstance(recipe.data, str | Path) and not str(recipe.data):
        found.insert(0, "no data is named")
    if found:
        raise UserError(f"{len(found)} problem(s) in the recipe", details=found, fix="mend the values named above")
    tune.check_places(out, home, resume, discard, force)
    existed = home.exists()
    home.mkdir(parents=True, exist_ok=True)
    try:
        with files.disk_errors(home), files.locked(home):
            return _story(recipe, home, out, listener)
    except (UserError, Interrupted, KeyboardInterrupt):
        dear = ("*/model.safetensors", "*.running/checkpoints/step-*", "data/mined.jsonl")
        if not existed and not any(path for pattern in dear for path in home.glob(pattern)):
            shutil.rmtree(home, ignore_errors=True)
        raise


def _story(recipe: Run, home: Path, out: Path, listener: Any) -> Ended:
    from embedtune import parts, parts_labels, run_labels, run_pairs

    kind = _kind(recipe)
    found: Any
    if kind in parts_labels.TASKS:
        found, tell = parts_labels.divide_labels(recipe, kind, listener.note), run_labels.tell_labels
    else:
        found, tell = parts.divide(recipe, listener.note, home), run_pairs.tell_pairs
    _same_as_before(home, {"recipe": schema.to_toml(recipe), "data": found.sha256})
    for line in found.remarks:
        listener.note(line)
    story, save_base = tell(recipe, found, home, out, listener)
    return _publish(story, save_base, home, out)


def _kind(recipe: Run) -> Any:
    """What the data is taken for: real queries are asked of text or pairs, and --labels False leaves labels alone."""
    from embedtune.data.columns import parse_columns
    from embedtune.data.kinds import LABELS, kind_of_data

    if recipe.labels is False or recipe.queries is not None:
        return "text"
    kind = kind_of_data(recipe.data, parse_columns(recipe.columns))
    if recipe.labels and kind not in LABELS:
        what = "has no column of labels, scores or tags that is known"
        raise UserError(what, where=tune.name_of(recipe.data), fix="name it: --columns text=NAME,label=NAME")
    return kind


def _same_as_before(home: Path, start: dict[str, Any]) -> None:
    """A run is continued only with what it was started with."""
    path = home / "run-start.json"
    if not path.is_file():
        files.write_json(path, start)
        return
    before = files.read_json(path)
    differs = [name for name in start if before.get(name) != start[name]]
    if differs:
        what = f"the run in {home} cannot be resumed: its {' and '.join(differs)} changed since it was started"
        raise UserError(what, fix="put it back, or start anew with --discard")


def _card(tuned: Path, story: dict[str, Any]) -> str:
    """The card that the tuning left, with the title, the verdict and the recipe of the run."""
    text = (tuned / "README.md").read_text(encoding="utf-8")
    title = next(line for line in text.splitlines() if line.startswith("# "))
    on_dev = files.read_json(tuned / "scores.json")["verdict"]
    text = text.replace(title, f"# {story['title']}", 1)
    text = text.replace(on_dev, f"{story['verdict']['sentence']}\n\nOn the rows that chose the best step: {on_dev}", 1)
    text = text.replace(f"`{schema.read_toml(tuned / 'recipe.toml')['model']}`", f"`{story['base']}`", 1)
    return text.replace((tuned / "recipe.toml").read_text(encoding="utf-8").strip(), story["recipe"].strip(), 1)


def _publish(story: dict[str, Any], save_base: Callable[[Path], None], home: Path, out: Path) -> Ended:
    """The kept model with its report becomes `out` by one rename; then what only the run needed goes."""
    from embedtune.judge.page import page

    kept = home / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    if story["model"] == "tuned":
        files.copy_folder(home / "tuned", kept)
        files.write_text(kept / "README.md", _card(kept, story))
    else:
        files.make_folder(kept)
        save_base(kept)
        for name in ("log.jsonl", "loss.png", "loss.svg", "run.json"):
            files.copy(home / "tuned" / name, kept / name)
        files.write_text(
            kept / "README.md", f"# {story['title']}\n\n{story['unchanged']} {story['verdict']['sentence']}\n"
        )
    files.write_text(kept / "recipe.toml", story["recipe"])
    files.write_json(kept / "scores.json", {k: v for k, v in story.items() if k not in ("log", "recipe")})
    files.write_text(kept / "report.html", page(story))
    files.move_directory(kept, out)
    files.remove_directory(home)
    return Ended(out, story)
