"""The story of a run on raw text or pairs: adapt, tune, average, judge base and tuned on queries."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embedtune import files, schema, tune
from embedtune.recipes import MLM, Contrastive, Ranking, Run, usual

MAIN = "nDCG@10"
MEASURES = ("nDCG@10", "MRR@10", "recall@10", "recall@100", "precision@10", "MAP", "accuracy@1")
EXAMPLES = 5
POOL = 20  # negatives are drawn from so many hard ones: among the very hardest are right answers that nobody marked
DIMS = (32, 64, 128, 256, 384, 512, 768, 1024)


def tell_pairs(recipe: Run, found: Any, home: Path, out: Path, listener: Any) -> tuple[dict[str, Any], Callable]:
    """The story, and a function that saves the base, for where it is kept."""
    from embedtune.enrich.write import write_rows

    base = recipe.model or tune.default_model()
    start, adapted = _adapt(recipe, base, found, home, listener)
    files.make_folder(home / "data")
    train, dev = home / "data" / "train.jsonl", home / "data" / "dev.jsonl"
    write_rows(dev, found.dev)
    write_rows(train, _with_negatives(recipe, found, start, home, listener))
    tuned = home / "tuned"
    if not tuned.is_dir():
        loop = usual(recipe)
        ranking = Ranking(guide=base, dims=recipe.dims)
        contrastive = Contrastive(train=str(train), dev=str(dev), model=start, merge="auto", ranking=ranking, loop=loop,
                                  dev_rows=10**6, dev_corpus=recipe.test_corpus)  # fmt: skip
        tune.finetune(contrastive, tuned, resume=tune.running(tuned).is_dir(), listener=listener)
    return _judge(recipe, base, adapted, found, home, out, listener), lambda folder: _save_base(base, folder)


def _save_base(base: str, folder: Path) -> None:
    from embedtune.encoder import embedder, load

    opened = embedder.load_trainable(load.find(base))
    embedder.save_embedder(opened.model, folder, opened.config_values)


def _adapt(recipe: Run, base: str, found: Any, home: Path, listener: Any) -> tuple[str, str | None]:
    """Masked language modelling first, where asked for or where the model has its head: (model, remark)."""
    from embedtune.encoder import load

    adapted = home / "adapted"
    if not found.text:
        return base, None
    wish = recipe.adapt if recipe.adapt is not None else load.has_mlm_head(load.find(base))
    if not wish:
        listener.note("no masked language modelling: the model has no head for it (--adapt does it all the same)")
        return base, None
    if not adapted.is_dir():
        text = home / "text.txt"
        with files.growing(text) as file:
            for number, paragraphs in enumerate(found.text):
                file.write(("\n" * (number > 0) + "\n".join(paragraphs) + "\n").encode())
        loop = dataclasses.replace(recipe.loop, lr=None, batch=None, measure=None)
        mlm = MLM(train=str(text), model=base, loop=loop)
        tune.finetune(mlm, adapted, resume=tune.running(adapted).is_dir(), listener=listener)
    scores = files.read_json(adapted / "scores.json")
    return str(adapted), f"masked language modelling first. {scores['verdict']}"


def _with_negatives(recipe: Run, found: Any, model: str, home: Path, listener: Any) -> Sequence[dict[str, Any]]:
    """The training pairs, with mined negatives where they are asked for (kept on disk: mining is dear)."""
    if not recipe.negatives:
        rows: list[dict[str, Any]] = found.train
        return rows
    from embedtune.data.pairs import read_pairs
    from embedtune.encoder.encode import open_encoder
    from embedtune.enrich.mine import Mining, mine, write_mined

    path = home / "data" / "mined.jsonl"
    if not path.is_file():
        pairs = list(read_pairs(found.train))
        pool = max(POOL, recipe.negatives)
        how = Mining(
            negatives=recipe.negatives,
            pool=pool,
            seed=recipe.loop.seed,
            other_groups=not found.real or bool(found.text),
        )
        mined = mine(pairs, None, open_encoder(model), how, scratch=home, note=listener.note)
        write_mined(path, mined)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _judge(
    recipe: Run, base: str, adapted: str | None, found: Any, home: Path, out: Path, listener: Any
) -> dict[str, Any]:
    """Read the test sets once, and decide."""
    from embedtune.encoder.encode import open_encoder
    from embedtune.fit.engine import read_log
    from embedtune.judge import compare
    from embedtune.judge.drift import model_drift
    from embedtune.judge.retrieval import judge_retrieval

    tuned = home / "tuned"
    listener.note("judging base and tuned on the test queries, which nothing has seen")
    models = [open_encoder(base), open_encoder(str(tuned))]
    dims = [None, *(d for d in (recipe.dims or DIMS) if d < models[0].dimension)]
    reports = {
        name: [judge_retrieval(model, data, MEASURES, dims=dims) for model in models]
        for name, data in found.tests.items()
    }
    changes = {name: [compare.paired(a, b, MAIN) for a, b in zip(*both)] for name, both in reports.items()}
    word = compare.verdict([c[0] for c in changes.values()])
    dev = files.read_json(tuned / "scores.json")
    coefficient = (dev.get("averaging") or {}).get("coefficient", 1.0 if dev["best_step"] else 0.0)
    unchanged = coefficient == 0.0 and adapted is None
    keep_base = word == "REGRESSION" or unchanged or (word != "WIN" and not found.real)
    return {
        "title": f"{Path(base).name} on {found.profile['name']}",
        "base": base,
        "model": "base" if keep_base else "tuned",
        "unchanged": "The base model, unchanged.",
        "verdict": _verdict(word, changes, found.real, keep_base, unchanged),
        "profile": {k: v for k, v in found.profile.items() if v not in (None, {}, [])},
        "remarks": [*found.remarks, *([adapted] if adapted else []), *files.read_json(tuned / "run.json")["remarks"]],
        "log": read_log(tuned),
        "tables": [_table(name, found.tests[name], both, compare) for name, both in reports.items()],
        "measure": MAIN,
        "shown": next(iter(reports)),  # the set that dimensions and changed queries are of
        "dims": _dims(reports, changes),
        "changed": _changed(reports, found.tests, compare),
        "averaging": dev.get("averaging") and {k: dev["averaging"][k] for k in ("coefficient", "tried")},
        "drift": _drift(model_drift(*models)),
        "examples_of_pairs": found.examples,
        "repeat": [f"embedtune run {tune.name_of(recipe.data)} --out {out}", "embedtune run recipe.toml"],
        "recipe": schema.to_toml(dataclasses.replace(recipe, model=base, adapt=adapted is not None)),
        "machine": tune.machine(tuned),
    }


def _verdict(word: str, changes: dict[str, Any], real: bool, keep_base: bool, unchanged: bool) -> dict[str, Any]:
    """The verdict in one sentence, and the intervals it rests on."""
    spans = "; ".join(
        f"{name}: {MAIN} {c[0].value:+.4f} (95 % interval {c[0].low:+.4f} to {c[0].high:+.4f}, {c[0].items:,} queries)"
        for name, c in changes.items()
    )
    kept = "the base is kept" if keep_base else "the tuned model is kept"
    why = ", since nothing was better on dev" if unchanged else ""
    where = "the test queries" if real else "the proxy queries"
    found = {
        "WIN": f"the tuned model finds more on {where}",
        "MARGINAL": f"no clear difference on {where}",
        "REGRESSION": f"the tuned model finds less on {where}",
    }[word]
    sentence = f"{word}: {found}; {kept}{why}."
    return {"word": word, "sentence": sentence, "queries": "real" if real else "proxy", "kept": kept, "changes": spans}


def _table(name: str, data: Any, both: Any, compare: Any) -> dict[str, Any]:
    base, tuned = both[0][0], both[1][0]
    rows = []
    for measure in MEASURES:
        change = compare.paired(base, tuned, measure)
        rows.append({
            "measure": measure, "base": base.summary[measure], "tuned": tuned.summary[measure],
            "change": change.value, "low": change.low, "high": change.high, "p": change.p,
        })  # fmt: skip
    return {"name": name, "queries": len(data.queries), "corpus": len(data.corpus), "rows": rows}


def _dims(reports: dict[str, Any], changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Base and tuned at each dimension on the first test set, with the interval of their difference."""
    name = next(iter(reports))
    rows = [
        {"dim": a.dim, "base": a.summary[MAIN], "tuned": b.summary[MAIN], "low": c.low, "high": c.high}
        for a, b, c in zip(*reports[name], changes[name], strict=True)
    ]
    return sorted(rows, key=lambda row: -row["dim"])


def _changed(reports: dict[str, Any], tests: dict[str, Any], compare: Any) -> dict[str, Any]:
    name = next(iter(reports))
    sides = compare.changed_most(reports[name][0][0], reports[name][1][0], MAIN, EXAMPLES, data=tests[name])

    def shown(found: Any) -> list[dict[str, Any]]:
        return [{"text": d.text, "score": d.score, "relevant": bool(d.relevance)} for d in found]

    return {
        side: [
            {
                "query": c.text,
                "change": c.after - c.before,
                "base": shown(c.found_before),
                "tuned": shown(c.found_after),
            }
            for c in changes
        ]
        for side, changes in zip(("better", "worse"), sides, strict=True)
    }


def _drift(found: Any) -> dict[str, Any]:
    return {"overlap@10": found.overlap, "rank_correlation": found.rank_correlation, "texts": found.texts}
