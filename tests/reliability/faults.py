"""Faults in a child process: count every call that changes the disk, and kill or fail at the k-th.

With "each": [k, ...] and "to": DIR the child forks once for every k where the counting begins; each of these goes on
in a copy of the working directory of its own, DIR/k, and meets its fault there.
"""

import builtins
import errno
import json
import os
import shutil
import signal
from datetime import timedelta
from pathlib import Path

import embedtune.judge.drift
import embedtune.plots
import embedtune.plots_labels
from embedtune import files
from embedtune.fit import ranks

STATE = {
    "count": 0,
    "kind": None,
    "at": 0,
    "watch": None,
    "open": False,
    "names": [],
    "place": ".running",
    "from": None,
}
NEED_SPACE = ("create", "write", "fsync", "mkdir", "rename")
TRUE = {"open": builtins.open, "rename": os.rename, "fsync": os.fsync, "unlink": os.unlink, "rmdir": os.rmdir}


def tick(name: str, path: object, partial=None) -> None:
    """One call that changes the disk: the fault strikes before it, and after a part of it where it is a write."""
    if STATE["watch"] is None or not watched(str(path)):
        return
    if STATE.get("each"):
        spread(STATE.pop("each"), Path(STATE["to"]))
    called = f"{name} {Path(str(path)).name}"
    if STATE["from"] not in (None, called):
        return
    STATE["from"] = None
    STATE["count"] += 1
    STATE["names"].append(called)
    lasting = STATE["kind"] == "enospc-on" and STATE["count"] > STATE["at"]
    if STATE["kind"] == "count" or not (STATE["count"] == STATE["at"] or lasting and name in NEED_SPACE):
        return
    if partial is not None:
        partial()
    if STATE["kind"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if STATE["kind"] == "signal-at":
        os.kill(os.getpid(), signal.SIGTERM)
        return
    if STATE["kind"] == "signal-twice":
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    if name in NEED_SPACE:
        code = errno.EIO if STATE["kind"] == "eio" else errno.ENOSPC
        raise OSError(code, os.strerror(code), str(path))


def spread(places: list, folder: Path) -> None:
    """Returns in the forked processes only; the process that forks them waits for each and leaves."""
    STATE["open"] = False
    statuses = {}
    for place in places:
        pid = os.fork()
        if pid == 0:
            shutil.copytree(".", folder / str(place), ignore=shutil.ignore_patterns("said-*"))
            os.chdir(folder / str(place))
            log = os.open("said-fault.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            STATE.update(at=place, open=True)
            return
        statuses[place] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (folder / "statuses.json").write_text(json.dumps(statuses))
    os._exit(0)


def watched(path: str) -> bool:
    return STATE["open"] and STATE["place"] in path


class Writer:
    """A file opened for writing whose writes are counted; a struck one has written half of its bytes."""

    def __init__(self, file, path) -> None:
        self.file, self.path = file, path

    def write(self, data):
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        tick("write", self.path, half)
        return self.file.write(data)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)


def counted_open(path, mode="r", *args, **kwargs):
    if isinstance(path, int) or not set(mode) & set("wax+"):
        return TRUE["open"](path, mode, *args, **kwargs)
    tick("create", path)
    return Writer(TRUE["open"](path, mode, *args, **kwargs), path)


def counted(name: str):
    def call(path, *args, **kwargs):
        tick(name, _path_of(path, kwargs.get("dir_fd")))
        return TRUE[name](path, *args, **kwargs)

    return call


def _path_of(path, directory=None) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    if directory is not None:
        return os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
    return str(path)


def witness() -> None:
    """Write down, beside the run, the rows of every step, and what weights and moments are when training has ended."""
    import embedtune.fit.engine as engine

    learn, train = engine.Run._forward_backward, engine.train

    def note(home: Path, **seen) -> None:
        out, *stage = home.parts
        with TRUE["open"](f"witness-{out.removesuffix('.running')}.jsonl", "a") as file:
            file.write(json.dumps({"stage": "/".join(stage), **seen}) + "\n")

    def learned(self, epoch, rows):
        note(self.home, step=self.state.step, epoch=epoch, rows=rows.tolist())
        return learn(self, epoch, rows)

    def trained(objective, loop, score, home, *more):
        outcome = train(objective, loop, score, home, *more)
        if os.environ.get("RANK", "0") != "0":  # the first process may have tidied up already
            return outcome
        newest = sorted((home / "checkpoints").glob("step-*"))[-1]
        note(home, step=outcome.state.step, state=files.sha256(newest / "state.safetensors"))
        return outcome

    engine.Run._forward_backward, engine.train = learned, trained


def in_a_step(kind: str, wanted: int, at: list) -> None:
    """In one step, memory runs out at these of its backward passes, or a gradient or an unread weight becomes NaN."""
    import torch

    import embedtune.fit.engine as engine

    learn, backward, now = engine.Run._forward_backward, torch.Tensor.backward, {"step": None, "passes": 0}

    def learned(self, epoch, rows):
        now["step"] = self.state.step
        found = learn(self, epoch, rows)
        now["step"] = None
        if kind == "nan" and self.state.step == wanted:
            next(p for p in self.optimizer.masters.values() if p.grad is not None).grad.view(-1)[0] = torch.nan
        if kind == "weight" and self.state.step == wanted:
            table = next(name for name in self.optimizer.masters if "word_embeddings" in name)
            self.optimizer.masters[table].data[1, 0] = torch.nan  # [UNK], which no row has
        return found

    def struck(self, *args, **more):
        if kind == "memory" and now["step"] == wanted:
            now["passes"] += 1
            if at is None or now["passes"] in at:
                raise MemoryError
        return backward(self, *args, **more)

    engine.Run._forward_backward, torch.Tensor.backward = learned, struck


def install(fault: dict | None, plot: bool) -> None:
    """fault: {"kind": "kill" | "enospc" | "enospc-on" | "eio" | "count", "at": k, "watch": WHEN}, and maybe "place".

    WHEN is "start", "save:STEP", "after:STEP" (from the end of that save to the end of training) or "finish": from
    then on calls count.
    "place" is a part of the paths whose calls count, by default ".running"; "from" a call that is the first to count.
    Or {"kind": "memory" | "nan" | "weight", "step": n, "at": [k, ...] or none for all}; or {"kind": "elsewhere",
    "to": DIR}: it runs in another folder. "rank" is the one process that meets it.
    """
    if not plot:  # drawing is most of a tiny run's time; the picture has tests of its own
        embedtune.plots.loss_curve = lambda records, stem, title, unit: files.write_bytes(
            stem.with_suffix(".png"), b"png"
        )
        embedtune.plots_labels.save_figure = lambda figure, stem: None
        embedtune.judge.drift.TEXTS = 40  # and reading so many docstrings is a third of a tiny story's
    ranks.START = timedelta(seconds=6)  # forked processes meet at once, or one of them was killed
    witness()
    if not fault or os.environ.get("RANK", "0") != str(fault.pop("rank", os.environ.get("RANK", "0"))):
        return
    if fault["kind"] in ("memory", "nan", "weight"):
        in_a_step(fault["kind"], fault["step"], fault.get("at"))
        return
    if fault["kind"] == "elsewhere":
        os.chdir(fault["to"])
        return
    STATE.update(fault)
    builtins.open = counted_open
    for name in ("rename", "fsync", "unlink", "rmdir"):
        setattr(os, name, counted(name))
    make = Path.mkdir

    def mkdir(self, *args, **kwargs):
        tick("mkdir", self)
        return make(self, *args, **kwargs)

    Path.mkdir = mkdir
    _open_window(fault["watch"])


def _open_window(watch: str) -> None:
    """Count only from the moment a step has been learned until its checkpoint is whole, or from the end of training."""
    import embedtune.fit.engine as engine

    if watch == "finish":
        train = engine.train

        def trained(*args, **kwargs):
            outcome = train(*args, **kwargs)
            STATE["open"] = True
            return outcome

        engine.train = trained
        return
    if watch == "start":
        STATE["open"] = True
        return
    when, _, number = watch.partition(":")
    wanted, step, save, go = int(number), engine.Run._step, engine.Run._save, engine.Run.go

    def stepped(self):
        step(self)
        STATE["open"] = when == "save" and self.state.step == wanted

    def saved(self):
        path = save(self)
        STATE["open"] = when == "after" and self.state.step == wanted
        return path

    def gone(self, *args):
        STATE["open"] = when == "after" and self.state.step == wanted  # resumed from that save
        why = go(self, *args)
        STATE["open"] = False
        return why

    engine.Run._step, engine.Run._save, engine.Run.go = stepped, saved, gone


def report() -> None:
    """The calls that were counted, for the test that enumerates them."""
    if STATE["kind"] == "count":
        STATE["open"] = False
        print("COUNTED " + "|".join(STATE["names"]))
