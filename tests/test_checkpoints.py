"""A run that something befalls goes on and ends as another; benchmarks/faults.py tries more."""

import importlib
import os
import shutil
import zipfile
from functools import partial
from operator import methodcaller
from pathlib import Path

import faults
import jax
import numpy as np
import pytest
from conftest import edited_program, read_history, read_json, tree

from grpo_mnist import load_config, train

FLAGS = (  # An epoch has one step.
    "--dataset=digits --batch-size=18000 --num-iterations=1 --num-epochs=3 --num-seeds=2 "
    "--baseline=ema --beta=0.01 --ref-sync-epochs=1 --output-dir=run --data-dir=unused"
)
# These take a process each, and are almost the same as others.
LEFT_OUT = ("SIGKILL at a random", "SIGINT", "power cut there: contents")
FAULTS = {  # The first epoch's report ends with the 16th operation on the disk; the 17th fails.
    fault: attempts[16] if "there" in fault or "n-th" in fault else attempts[0]
    for fault, _, attempts in faults.everything()
    if not fault.startswith(LEFT_OUT)
}
FAULTS["resumed for the picture alone"] = methodcaller("tampered", os.stat, "3 of 3", epoch=3)
NO_KEY = "(expected if name == 'key' else arrays)[name] for name"
LOCK = 'FileLock(run_dir / ".lock", timeout=0).acquire()'
SAFEGUARDS = {  # a word of the fault that it is for; an edit of the program that takes it out
    "digest": ("one bit", "if hashlib.sha256(content[:-32]).digest() ==", "if content or"),
    "fsync_of_a_file": ("names not synced", "os.fsync(file.fileno())", "pass"),
    "fsync_of_a_directory": ("names not synced", "os.fsync(descriptor)", "pass"),
    "random_key": ("deleted", "arrays[name] for name", NO_KEY),
    "lock": ("second run", LOCK, "contextlib.nullcontext()"),
}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    return faults.Laboratory(tmp_path_factory.mktemp("laboratory"), FLAGS, in_process=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_survives(fault, laboratory):
    FAULTS[fault](laboratory)


@pytest.mark.parametrize("safeguard", SAFEGUARDS)
def test_each_safeguard_turns_a_test_red(safeguard, laboratory, tmp_path, monkeypatch):
    """Taken out of the program, the run does not survive its fault as above."""
    word, *edit = SAFEGUARDS[safeguard]
    (attempt,) = [FAULTS[fault] for fault in FAULTS if word in fault]
    edited_program(tmp_path / f"without_{safeguard}.py", edit)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(laboratory, "program", importlib.import_module(f"without_{safeguard}"))
    with pytest.raises((AssertionError, zipfile.BadZipFile)):
        attempt(laboratory)


def test_a_run_without_a_whole_checkpoint_does_not_go_on(laboratory):
    place = laboratory.new_place(epoch=2)
    for damage, notices in ((partial(faults.flip, part=0.1), [2, 1]), (os.unlink, [])):
        for path in (place / "run/checkpoints").iterdir():
            damage(path)
        result = laboratory.run(place, *faults.RESUME)
        faults.check_refusal(result, 1, "run/checkpoints: no whole checkpoint; put one back")
        said = [line.partition(" does not match its SHA-256")[0] for line in result[1].splitlines()]
        assert said == [f"NOTICE: run/checkpoints/epoch-{epoch}.npz" for epoch in notices]


def test_a_checkpoint_of_another_program_is_refused(laboratory):
    """If its arrays do not fit, as after an edit of the program, they are not made to."""
    other = partial(faults.forge, change=lambda _, x: x.update(key=x["key"].astype(np.int32)))
    laboratory.tampered(other, "epoch-2.npz holds other arrays than this program", status=1)


def test_a_checkpoint_of_an_older_program_goes_on(laboratory):
    """A flag that is not in it had its default. The damaged config.json is replaced by its copy."""

    def make_older(header, _):
        header["facts"].pop("loss_type")
        header["facts"]["versions"]["jax"] = "0.4.1"

    place = laboratory.new_place(epoch=2)
    config = place / "run/config.json"
    faults.forge(place / "run/checkpoints/epoch-2.npz", make_older)
    config.write_text("{")
    resume = partial(laboratory.run, place, *faults.RESUME)
    faults.check_refusal(resume("--loss-type=dg"), 2, "loss_type was ppo_clip, is dg")
    status, output, errors = resume("--data-dir=elsewhere", "--output-dir=run")
    assert (status, errors, output.count("NOTICE")) == (0, "", 1)
    assert f"NOTICE: jax was 0.4.1, is {jax.__version__}: results may differ" in output
    assert "Resumed: 2 of 3 epochs are done" in output
    changed = {"data_dir": "elsewhere", "resume": "run"}
    assert read_json(config) == read_json(laboratory.finished / "run/config.json") | changed


CONTRADICTIONS = {  # flags, and what the line on standard error must hold
    "--resume=nowhere": "nowhere is not the directory of a run",
    "--resume": "--resume",
    "--resume=run --seed=3": "in run, seed was 0, is 3; leave that flag out",
    "--resume=run --baseline=batch": "baseline was ema, is batch",
    "--resume=run --output-dir=other": "--output-dir other must be run, as --resume",
    "--resume=edited": "in edited, num_epochs was 3, is 9",
}


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_a_flag_that_contradicts_the_run_is_refused(flags, laboratory):
    place = laboratory.new_place(epoch=2)
    config = Path(shutil.copytree(place / "run", place / "edited"), "config.json")
    config.write_text(config.read_text().replace('"num_epochs": 3', '"num_epochs": 9'))
    before = tree(place)
    faults.check_refusal(laboratory.run(place, *flags.split()), 2, CONTRADICTIONS[flags])
    assert tree(place) == before


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # left to Python to close
def test_a_finished_run_says_so_and_is_left_alone(laboratory, monkeypatch):
    monkeypatch.chdir(laboratory.finished)
    assert sorted(os.listdir("run/checkpoints")) == ["epoch-2.npz", "epoch-3.npz"]
    before = {path: path.read_bytes() for path in Path("run").rglob("*.*")}
    said = "run: this run is finished; nothing is left to do.\n"
    result = laboratory.run(".", *faults.RESUME, "--num-epochs=3", "--seed=0")
    assert result == (0, said, "")
    assert train(load_config(Path("run"))) == read_history("run")
    assert {path: path.read_bytes() for path in Path("run").rglob("*.*")} == before
