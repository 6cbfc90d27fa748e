"""Checkpoints whose bytes were changed: all of it is found, the newest valid one is taken, and it is said."""

import random
import shutil

import pytest
import torch

from embedtune import files
from embedtune.errors import UserError
from embedtune.fit import checkpoint
from embedtune.fit.checkpoint import State
from reliability import ledger

LONG = [pytest.param(block, marks=pytest.mark.slow) for block in range(1, 13)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two checkpoints with best weights of their own, as a run leaves them."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    for step, best in ((3, 2), (6, 5)):
        weights = {f"layer.{n}": torch.randn(40, 12, generator=torch.Generator().manual_seed(step)) for n in range(3)}
        checkpoint.save_best(folder, best, weights)
        tensors = {
            f"{kind}.{name}": w.clone() for kind in ("weight", "exp_avg", "exp_avg_sq") for name, w in weights.items()
        }
        checkpoint.save(folder, State(step=step, best=float(step), best_step=best, events=["one", "two"]), tensors)
    return folder


def needed(folder, step):
    """All files that a checkpoint cannot do without."""
    best = files.read_json(folder / f"step-{step:07d}" / "state.json")["best_step"]
    return sorted([*(folder / f"step-{step:07d}").iterdir(), *(folder / f"best-{best:07d}").iterdir()])


def flip(draw, path, other):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(draw, path, other):
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data) - 1)])  # JSON may do without its last line end


def blank(draw, path, other):
    """Zeros to the end from somewhere on, as a power cut may leave them."""
    data = path.read_bytes()
    at = draw.randrange(len(data) - 1)
    path.write_bytes(data[:at] + bytes(len(data) - at))


def lengthen(draw, path, other):
    path.write_bytes(path.read_bytes() + bytes(draw.randrange(1, 9)))


def remove(draw, path, other):
    path.unlink()


def swap(draw, path, other):
    """With the file of that name of the checkpoint before."""
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


def swap_folders(draw, path, other):
    """Both are whole, but neither is what its name says."""
    aside = path.parent.with_name("aside")
    path.parent.rename(aside)
    other.parent.rename(path.parent)
    aside.rename(other.parent)


# How often each: flips and cuts have many places, the others few.
HARMS = {flip: 600, truncate: 200, blank: 80, lengthen: 40, remove: 30, swap: 40, swap_folders: 10}


def damaged_by(draw, harm, folder):
    """Harm one file that the newest checkpoint needs; whether the one before is still whole."""
    new, old = needed(folder, 6), needed(folder, 3)
    place = draw.randrange(len(new))
    path, other = new[place], old[place]
    if harm in (swap, swap_folders) and path.read_bytes() == other.read_bytes():
        return damaged_by(draw, harm, folder)
    harm(draw, path, other)
    return harm not in (swap, swap_folders)


@pytest.mark.target("A6")
@pytest.mark.parametrize("block", [0, *LONG])
def test_all_damage_is_found_and_the_checkpoint_before_is_taken(written, tmp_path, block):
    draw = random.Random(block)
    before = checkpoint.newest(written)
    assert before[0].step == 6 and before[2] == []
    harms = draw.sample(list(HARMS), counts=list(HARMS.values()), k=500 if block else 240)
    for number, harm in enumerate(harms):
        folder = tmp_path / str(number)
        shutil.copytree(written, folder)
        if damaged_by(draw, harm, folder):
            state, tensors, remarks = checkpoint.newest(folder)
            assert state.step == 3, harm.__name__
            assert len(remarks) == 1 and "step-0000006 is damaged and was passed over" in remarks[0]
            assert all(torch.equal(tensors[f"weight.{name}"], w) for name, w in checkpoint.load_best(folder, 2).items())
        else:  # nothing is left that is what it says
            with pytest.raises(UserError, match="no checkpoint is intact") as caught:
                checkpoint.newest(folder)
            assert len(caught.value.details) == 2 and "--discard" in caught.value.fix
        shutil.rmtree(folder)
        ledger.count()
