"""What is saved is the same bytes every time; places without locks, fsync, chmod, rights, links, or files."""

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Killed, assert_same_run, interrupted, newest
from safetensors.torch import load_file, save_model
from test_models import t5_config
from torch import nn
from toy import toy_loop, train
from transformers import T5ForConditionalGeneration

import caches
import checkpoints
import storage
from models import Generator
from options import UserError

pytestmark = pytest.mark.usefixtures("the_end_is_kept")


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(storage, "_said", set())


def failing(real, name: str, when=lambda *_: True):
    """`real`, which answers with the error of that name where `when` says so."""

    def call(*args, **kwargs):
        if when(*args):
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        return real(*args, **kwargs)

    return call


def of_a_folder(handle, *_) -> bool:
    return stat.S_ISDIR(os.fstat(handle).st_mode)


def content(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("events.out")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# ---------------------------------------------------------------------------------------------------- weights


def tied_generator() -> Generator:
    settings = {
        "backbone": t5_config().to_dict(),
        "exemplars": "none",
        "exemplar_width": 0,
        "exemplar_backbone": None,
    }
    return Generator(settings, T5ForConditionalGeneration(t5_config()))


def test_the_same_weights_give_the_same_bytes_in_every_process(tmp_path):
    model = tied_generator()
    model.save_pretrained(tmp_path / "first")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from models import Generator\n"
        "for n in range(6): Generator.from_pretrained(sys.argv[2]).save_pretrained(f'{sys.argv[3]}-{n}')"
    )
    for seed in ("1", "2"):
        words = [sys.executable, "-c", code, str(ROOT), str(tmp_path / "first"), str(tmp_path / seed)]
        subprocess.run(words, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    found = {f.read_bytes() for f in tmp_path.glob("*/model.safetensors")}
    assert len(list(tmp_path.glob("*/model.safetensors"))) == 13 and len(found) == 1


def test_a_tied_tensor_is_stored_once_and_loads_as_it_was(tmp_path):
    model = tied_generator()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert len(names) > len(dict(model.named_parameters())) == len(stored)
    again = Generator.from_pretrained(tmp_path)
    assert again.t5.lm_head.weight is again.t5.shared.weight
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_weights_of_earlier_runs_still_load(tmp_path):
    """`save_model` wrote them: one name of a tied tensor, the others in the metadata."""
    model, other = tied_generator(), tied_generator()
    nn.init.normal_(other.speakers.weight)
    save_model(other, str(tmp_path / "old.safetensors"))
    storage.save_weights(other, tmp_path / "new.safetensors")
    assert load_file(tmp_path / "old.safetensors").keys() == load_file(tmp_path / "new.safetensors").keys()
    storage.load_weights(model, tmp_path / "old.safetensors")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_views_and_empty_tensors_are_saved_whole(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
            self.register_buffer("none", torch.zeros(0, 2))
            self.register_buffer("nothing", torch.zeros(0, 2))

    storage.save_weights(Odd(), tmp_path / "odd.safetensors")
    empty = Odd()
    empty.turned.zero_()
    storage.load_weights(empty, tmp_path / "odd.safetensors")
    assert torch.equal(empty.turned, torch.arange(6.0).view(2, 3).t())


# ---------------------------------------------------------------------------------- what a file system cannot


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EBADF", "EINVAL"])
def test_without_locks_a_run_goes_on_with_one_warning(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, name))
    for run in ("one", "two"):
        train(tmp_path / run, epochs=1)
    shown = capsys.readouterr().out
    assert shown.count("warning: ") == 1 and f"{tmp_path / 'one'}: its file system has no locks" in shown


@pytest.mark.parametrize("name", ["EIO", "EACCES"])
def test_a_lock_that_fails_in_earnest_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, name))
    with pytest.raises(UserError, match="run: cannot be locked"):
        train(tmp_path / "run")


@pytest.mark.parametrize("name", ["EINVAL", "ENOSYS", "EOPNOTSUPP", "EBADF"])
@pytest.mark.parametrize("when", [of_a_folder, lambda *_: True], ids=["of folders", "at all"])
def test_without_fsync_a_run_goes_on_with_a_warning_of_each_kind(tmp_path, monkeypatch, capsys, name, when):
    monkeypatch.setattr(os, "fsync", failing(os.fsync, name, when))
    train(tmp_path / "run", epochs=1)
    shown = capsys.readouterr().out
    assert shown.count("has no fsync of folders") == 1
    assert shown.count("warning: ") == (1 if when is of_a_folder else 2)


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT", "EACCES"])
def test_an_fsync_that_fails_in_earnest_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "fsync", failing(os.fsync, name, of_a_folder))
    with pytest.raises(UserError, match="out.txt: cannot be written"):
        storage.write_text(tmp_path / "out.txt", "x")


def test_without_chmod_a_run_is_finished_with_one_warning(tmp_path, monkeypatch, capsys):
    def export(folder):
        for side in ("one", "two"):
            storage.save_weights(loop.model, folder / f"{side}.safetensors")

    monkeypatch.setattr(os, "chmod", failing(os.chmod, "EPERM"))
    loop = toy_loop(tmp_path / "run", epochs=1)
    loop.export = export
    loop.finish(loop.train())
    assert (tmp_path / "run" / "result.json").exists()
    assert capsys.readouterr().out.count("has no chmod") == 1


def test_a_chmod_that_fails_in_earnest_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setattr(os, "chmod", failing(os.chmod, "EIO"))
    with pytest.raises(OSError, match="Input/output error"):
        storage.share(tmp_path)


# ------------------------------------------------------------------------------------- places without a cache


def squares() -> dict[str, np.ndarray]:
    return {"numbers": np.arange(3), "squares": np.arange(3) ** 2}


@pytest.mark.parametrize("name", ["EROFS", "EACCES"])
def test_where_no_cache_may_be_written_none_is_kept_and_that_is_said_once(
    tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(os, "mkdir", failing(os.mkdir, name))
    for file in ("a.npz", "b.npz"):
        assert caches.cached(tmp_path / "cache" / file, squares)["squares"].tolist() == [0, 1, 4]
    rows = caches.in_chunks([0], lambda _: squares(), tmp_path / "cache" / "labels-0a1b", "")
    assert rows["squares"].tolist() == [0, 1, 4]
    shown = capsys.readouterr().out
    assert shown.count("warning: ") == 1 and f"{tmp_path / 'cache'}: may not be written" in shown


@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_a_cache_on_a_full_or_broken_disk_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "mkdir", failing(os.mkdir, name))
    with pytest.raises(UserError, match="cannot be written"):
        caches.cached(tmp_path / "cache" / "a.npz", squares)


def test_where_an_output_may_not_be_written_nothing_is_computed_for_it(tmp_path, monkeypatch):
    """Neither after the first of the chunks that wait beside it, nor at all where the stage asks before."""
    done = []

    def work(group):
        done.append(group)
        return squares()

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "mkdir", failing(os.mkdir, "EROFS"))
    with pytest.raises(UserError, match="cannot be written"):
        caches.in_chunks([0, 1, 2], work, tmp_path / "run" / ".partial-0a1b", "", size=1)
    assert len(done) == 1
    with pytest.raises(UserError, match="labels: cannot be written"):
        storage.ready(tmp_path / "labels" / "train.csv", {}, overwrite=False)


def test_a_read_only_mount_in_earnest(tmp_path):
    """The data on a medium that cannot be written: the work is done, once a call."""
    place = tmp_path / "data"
    place.mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, numpy, caches\n"
        "for name in 'ab':\n"
        "    file = pathlib.Path(sys.argv[2]) / 'cache' / name\n"
        "    made = caches.cached(file, lambda: {'x': numpy.arange(3)})\n"
        "    assert made['x'].tolist() == [0, 1, 2]"
    )
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o ro tmpfs {place}"
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a tmpfs")
    (tmp_path / "code.py").write_text(code)
    command = f"{mount} && {sys.executable} {tmp_path / 'code.py'} {ROOT} {place}"
    done = subprocess.run([*inside, command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("may not be written") == 1


# -------------------------------------------------------------------------------------- checkpoints as a link


def linked(folder: Path, target: Path) -> None:
    """A run of one killed process whose checkpoints lie elsewhere, beside something of the user's."""
    interrupted(folder)
    (folder / "checkpoints").rename(target)
    (target / "notes.txt").write_text("mine")
    (folder / "checkpoints").symlink_to(target)


def test_overwrite_clears_checkpoints_behind_a_link_and_keeps_the_link(tmp_path):
    linked(tmp_path / "run", tmp_path / "room")
    train(tmp_path / "run", save_every=2, lr=0.02, overwrite=True)
    train(tmp_path / "fresh", save_every=2, lr=0.02)
    assert_same_run(tmp_path / "run", tmp_path / "fresh")
    assert (tmp_path / "run" / "checkpoints").is_symlink()
    assert [p.name for p in (tmp_path / "room").iterdir()] == ["notes.txt"]


def test_overwrite_removes_any_other_link_and_not_what_is_behind_it(tmp_path):
    train(tmp_path / "run")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "encoder").symlink_to(tmp_path / "shared")
    train(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "encoder").is_symlink()
    assert (tmp_path / "shared" / "notes.txt").read_text() == "mine"


def test_a_link_may_be_there_before_the_run(tmp_path):
    """As it is where --overwrite was killed between its last deletion and the first file of the new run."""
    for folder in ("run", "room"):
        (tmp_path / folder).mkdir()
    (tmp_path / "room" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "room")
    assert interrupted(tmp_path / "run") and list(checkpoints.steps(tmp_path / "room"))
    train(tmp_path / "run", save_every=2)


def test_a_run_with_checkpoints_behind_a_link_goes_on(tmp_path):
    linked(tmp_path / "run", tmp_path / "room")
    train(tmp_path / "run", save_every=2)
    train(tmp_path / "whole", save_every=2)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_link_to_nowhere_is_no_new_beginning_unasked(tmp_path):
    linked(tmp_path / "run", tmp_path / "room")
    (tmp_path / "room").rename(tmp_path / "unmounted")
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoints: a link to \S+room, which is not there"):
        train(tmp_path / "run", save_every=2)
    assert content(tmp_path / "run") == before
    train(tmp_path / "run", save_every=2, overwrite=True)
    train(tmp_path / "whole", save_every=2)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_overwrite_that_is_killed_is_done_by_the_next_call(tmp_path, monkeypatch):
    """Also where weights stand and neither result.json nor checkpoints do."""
    train(tmp_path / "run")
    storage.save_weights(nn.Linear(2, 2), tmp_path / "run" / "model.safetensors")

    def unlink(self, *args, **kwargs):
        if self.name == "model.safetensors":
            raise Killed
        os.unlink(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", unlink)
        train(tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "model.safetensors").exists()
    train(tmp_path / "run")
    train(tmp_path / "fresh")
    assert_same_run(tmp_path / "run", tmp_path / "fresh")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / ".overwriting").exists()


def test_what_cannot_be_deleted_is_named_and_the_next_call_goes_on(tmp_path, monkeypatch):
    train(tmp_path / "run")
    (tmp_path / "run" / "x" / "y").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", failing(shutil.rmtree, "EBUSY"))
        with pytest.raises(UserError, match=r"cannot be removed .*remove it by hand"):
            train(tmp_path / "run", overwrite=True)
    train(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "x").exists()


# ---------------------------------------------------------------------------------------------- what has gone


def test_without_environment_json_a_run_goes_on_and_its_card_says_what_is_unknown(tmp_path, capsys):
    interrupted(tmp_path / "run")
    (tmp_path / "run" / "environment.json").unlink()
    train(tmp_path / "run", save_every=2)
    assert f"{tmp_path / 'run' / 'environment.json'}: gone" in capsys.readouterr().out
    made = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [r["step"] for r in made["resumed"]] == [10]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Made by `unknown`" in card and "resumed 1 times" in card


def test_a_damaged_environment_json_is_named_before_anything_is_changed(tmp_path):
    older = interrupted(tmp_path / "run")[0]
    (tmp_path / "run" / "environment.json").write_text("{")
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match="environment.json: not a readable JSON file"):
        train(tmp_path / "run", save_every=2, resume=str(older))
    assert content(tmp_path / "run") == before


def test_finished_weights_are_never_begun_over_unasked(tmp_path):
    train(tmp_path / "run")
    storage.save_weights(nn.Linear(2, 2), tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "result.json").unlink()
    before = content(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"model.safetensors: trained weights, but .*--overwrite deletes them"
    ):
        train(tmp_path / "run")
    assert content(tmp_path / "run") == before
    train(tmp_path / "run", overwrite=True)


def test_checkpoints_that_may_not_be_read_are_not_taken_for_none(tmp_path, monkeypatch):
    folder = interrupted(tmp_path / "run")[0].parent
    before = content(tmp_path / "run")
    for call in ("listdir", "scandir"):
        monkeypatch.setattr(os, call, failing(getattr(os, call), "EACCES", lambda p=".": Path(p) == folder))
    with pytest.raises(UserError, match=r"run: cannot be read or written .*Permission denied"):
        train(tmp_path / "run", save_every=2)
    monkeypatch.undo()
    assert content(tmp_path / "run") == before


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    last = interrupted(tmp_path / "run")[-1]
    real = Path.read_text

    def read_text(self, *args, **kwargs):
        if self == last / "manifest.json":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(UserError, match="Permission denied"):
        train(tmp_path / "run", save_every=2)
    assert last.exists()


def test_a_refused_resume_leaves_everything_where_it_was(tmp_path):
    (interrupted(tmp_path / "run")[-1] / "state.pt").write_bytes(b"damaged")
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match="--lr: 0.01 then, 0.02 now"):
        train(tmp_path / "run", save_every=2, lr=0.02)
    assert content(tmp_path / "run") == before


def test_a_run_folder_without_args_json_is_told_where_a_copy_is(tmp_path):
    last = interrupted(tmp_path / "run")[-1]
    (tmp_path / "run" / "args.json").unlink()
    with pytest.raises(UserError, match=f"copy {last / 'args.json'} there"):
        train(tmp_path / "run", save_every=2)
    shutil.copy(last / "args.json", tmp_path / "run")
    train(tmp_path / "run", save_every=2)


# ------------------------------------------------------------------------------------------ what is left over


def test_a_finished_run_keeps_its_weights_only(tmp_path, capsys):
    folder = tmp_path / "run"
    damaged = interrupted(folder)[-1]
    (damaged / "state.pt").write_bytes(b"damaged")
    (folder / ".partial-0a1b").mkdir()
    train(folder, save_every=2)
    assert not (folder / "checkpoints").exists() and not (folder / ".partial-0a1b").exists()
    with pytest.raises(
        UserError, match=r"no such folder; \S+run is finished, and .* no checkpoints; --overwrite"
    ):
        train(folder, save_every=2, resume=str(damaged))
    assert toy_loop(folder, save_every=2).train()["already_finished"]
    assert "already finished" in capsys.readouterr().out


def test_a_mistyped_checkpoint_is_told_which_there_are(tmp_path):
    there = interrupted(tmp_path / "run")
    with pytest.raises(UserError, match=f"no such folder; there are {there[0]}, {there[1]}"):
        train(tmp_path / "run", save_every=2, resume=str(tmp_path / "run" / "checkpoints" / "step-3"))


def test_killed_while_dropping_the_checkpoints_it_is_a_finished_run(tmp_path, monkeypatch):
    loop = toy_loop(tmp_path / "run")
    result = loop.train()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as far as a kill before the first deletion
        loop.finish(result)
    left = [p.name[:18] for p in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert left == [".gone-step-0000012", ".gone-step-0000018"]
    assert toy_loop(tmp_path / "run").train()["already_finished"]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_evaluation_does_not_write_the_optimizer_again(tmp_path, monkeypatch):
    """Saved before the evaluation, which may run out of memory; after it only what it has changed."""
    saved, real = [], torch.save
    monkeypatch.setattr(
        torch, "save", lambda parts, file: (saved.append(file.parent.name[5:17]), real(parts, file))
    )
    loop = toy_loop(tmp_path / "run")
    loop.train()
    loop.run.close()
    assert saved == ["step-0000006", "step-0000012", "step-0000018"]
    state = json.loads((newest(tmp_path / "run") / "state.json").read_text())
    assert state["evaluations"] == 3 and not state["evaluation_due"]
    assert not checkpoints.faults(newest(tmp_path / "run"))


def test_without_hard_links_checkpoints_are_copied(tmp_path, monkeypatch):
    train(tmp_path / "linked")
    monkeypatch.setattr(os, "link", failing(os.link, "EPERM"))
    train(tmp_path / "copied")
    assert_same_run(tmp_path / "linked", tmp_path / "copied")
    assert not checkpoints.faults(newest(tmp_path / "copied"))


def test_going_on_from_a_checkpoint_that_was_set_aside(tmp_path):
    """Its evaluation is yet to come: nothing stands under its own name to be completed."""

    def killed(loop):
        if loop.state.step == 12:
            raise Killed
        return {"loss": 1.0}

    with pytest.raises(Killed):
        train(tmp_path / "run", evaluate=killed)
    last = newest(tmp_path / "run")
    assert last.name == "step-0000012"
    aside = checkpoints.set_aside(last, "later")
    train(tmp_path / "run", evaluate=lambda loop: {"loss": 1.0}, resume=str(aside))
    train(tmp_path / "whole", evaluate=lambda loop: {"loss": 1.0})
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def old(path: Path, days: float) -> Path:
    for entry in (*path.rglob("*"), path) if path.is_dir() else (path,):
        os.utime(entry, (time.time() - days * 86400,) * 2)
    return path


def test_a_checkpoint_that_was_set_aside_comes_back_with_the_best_of_its_own_past(tmp_path):
    states = {"4-aaaaaa": (4, 1.0), "2-bbbbbb": (2, 1.0), "2-cccccc": (2, 9.0)}
    for name, (step, best) in states.items():
        folder = tmp_path / f"later-step-000000{name}"
        folder.mkdir()
        storage.write_json(folder / "state.json", {"step": step, "best_step": 2, "best": best})
    back = checkpoints.bring_back(tmp_path / "later-step-0000004-aaaaaa")
    assert back.name == "step-0000004" and (tmp_path / "later-step-0000002-cccccc").exists()
    assert storage.read_json(tmp_path / "step-0000002" / "state.json")["best"] == 1.0


def test_parts_of_killed_writes_go_once_nobody_can_be_at_them(tmp_path):
    parts = [tmp_path / f".{name}.0a1b2c3{n}.part" for n, name in enumerate(("a.txt", "a.txt", "b.txt"))]
    for part in parts:
        part.touch()
    old(parts[0], days=2)
    old(parts[2], days=2)
    storage.write_text(tmp_path / "a.txt", "x")
    assert [p.exists() for p in parts] == [False, True, True]  # the third waits for a write of its own file


def test_what_an_abandoned_stage_kept_goes_after_a_week(tmp_path):
    for name in (".partial-old", ".partial-new", "labels-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000.npz").touch()
    old(tmp_path / ".partial-old", days=8)
    old(tmp_path / "labels-old", days=8)
    old(tmp_path / ".partial-new", days=8)
    (tmp_path / ".partial-new" / "00001.npz").touch()  # a stage that is still at it
    caches.in_chunks([0], lambda _: squares(), tmp_path / ".partial-mine", "")
    assert {p.name for p in tmp_path.iterdir()} == {".partial-new", ".partial-mine", "labels-old"}


def test_without_locks_a_save_of_another_process_is_left_alone(tmp_path, monkeypatch):
    folder = interrupted(tmp_path / "run")[0].parent
    young, stale = (folder / f".tmp-step-0000012-{key}" for key in ("0a1b2c3d", "4e5f6a7b"))
    for leftover in (young, stale):
        leftover.mkdir()
    old(stale, days=2)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", failing(fcntl.flock, "ENOLCK"))
        with pytest.raises(UserError, match="--lr"):
            train(tmp_path / "run", save_every=2, lr=0.02)
    assert young.exists() and not stale.exists()
    with pytest.raises(UserError, match="--lr"):
        train(tmp_path / "run", save_every=2, lr=0.02)
    assert not young.exists()


def test_the_litter_of_a_stranger_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("thesis.txt", ".thesis.txt.0a1b2c3d.part"):
        (tmp_path / "mine" / name).write_text("years of work")
    with pytest.raises(UserError, match="choose another --name"):
        train(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / ".thesis.txt.0a1b2c3d.part").exists()
