"""A run that is killed, stopped or damaged, and goes on: it ends as the one that nothing befell.

benchmarks/faults.py has what befalls the runs here, and tries it more often.
"""

import contextlib
import importlib.util
import os
import shutil
import zipfile
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGKILL

import faults
import jax
import numpy as np
import pytest
from conftest import assert_one_line_error, edited_program, read_history, read_json, tree

from grpo_mnist import load_config, main, newest_checkpoint, train

QUICK = (  # An epoch has one step.
    *("--dataset=digits", "--batch-size=18000", "--num-iterations=1", "--num-epochs=3"),
    *("--output-dir=run", "--data-dir=unused"),
)
DAMAGED = "epoch-2.npz does not match its SHA-256"
after_an_epoch = partial(faults.read_until, beginning="Epoch 1/")
FAULTS = {
    "SIGKILL": lambda lab: lab.stopped(SIGKILL, after_an_epoch),
    "SIGINT": lambda lab: lab.stopped(SIGINT, after_an_epoch),
    # The first epoch's report ends with the 16th operation on the disk.
    "power cut": lambda lab: lab.crashed(17, "all"),
    "resumed after an epoch": lambda lab: lab.tampered(os.stat, "Resumed: 1 of 3", epoch=1),
    "resumed for the picture alone": lambda lab: lab.tampered(os.stat, "Resumed: 3 of 3", epoch=3),
    "a bit flipped": lambda lab: lab.tampered(partial(faults.flip, bit=9_999_999), DAMAGED),
    "full disk": lambda lab: lab.full_disk(),
    "directory moved away, a file in its place": lambda lab: lab.moved_away(leave_a_file=True),
    "NaN": lambda lab: lab.not_a_number(),
    "a second run": lambda lab: lab.second_run(),
}
RESTORED = "[arrays[name] for name in expected]"
NO_KEY = "[(expected if name == 'key' else arrays)[name] for name in expected]"
JUST_THE_KEY = "[(arrays if name == 'key' else expected)[name] for name in expected]"
LOCK = 'FileLock(run_dir / ".lock", timeout=0).acquire()'
SAFEGUARDS = {  # the fault that it is there for; an edit of the program that takes it out
    "nothing": ("resumed for the picture alone", '"""Teach ', '"""Teaches '),
    "digest": ("a bit flipped", "if hashlib.sha256(content[:-32]).digest() ==", "if content or"),
    "fsync of a file": ("power cut", "            os.fsync(file.fileno())\n", ""),
    "fsync of directories": ("power cut", "os.fsync(descriptor)", "pass"),
    "random key": ("resumed after an epoch", RESTORED, NO_KEY),
    "every other array": ("resumed after an epoch", RESTORED, JUST_THE_KEY),
    "lock": ("a second run", LOCK, "contextlib.nullcontext()"),
}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    flags = (*QUICK, "--baseline=ema")
    return faults.Laboratory(tmp_path_factory.mktemp("laboratory"), flags, in_process=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_survives(fault, laboratory):
    FAULTS[fault](laboratory)


@pytest.mark.parametrize("safeguard", SAFEGUARDS)
def test_each_safeguard_of_checkpoints_turns_a_test_red(safeguard, laboratory, monkeypatch):
    """Without it, the test of its fault, above, fails; with just another word, it passes."""
    fault, *edit = SAFEGUARDS[safeguard]
    path = edited_program(Path("grpo_mnist.py").absolute(), edit)
    specification = importlib.util.spec_from_file_location("edited", path)
    program = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(program)
    monkeypatch.setattr(laboratory, "program", program)
    red = pytest.raises((AssertionError, zipfile.BadZipFile))
    with contextlib.nullcontext() if safeguard == "nothing" else red:
        FAULTS[fault](laboratory)


@pytest.fixture
def checkpoints(laboratory, monkeypatch):
    """Those of the directory run, as it was after two epochs of three."""
    monkeypatch.chdir(laboratory.new_place(epoch=2))
    return Path("run/checkpoints")


def test_a_damaged_checkpoint_is_never_used(checkpoints):
    newest = checkpoints / "epoch-2.npz"
    whole = newest.read_bytes()
    lengths = (0, 99, len(whole) // 2, len(whole) - 1)
    damages = [partial(os.truncate, length=length) for length in lengths]
    bits = range(0, 8 * len(whole), len(whole) // 3)
    damages += [partial(faults.flip, bit=bit) for bit in bits]
    for damage in (*damages, os.unlink):
        newest.write_bytes(whole)
        damage(newest)
        assert newest_checkpoint(Path("run"))[0].name == "epoch-1.npz"


def test_without_a_whole_checkpoint_the_run_does_not_go_on(checkpoints, capfd):
    for damage, notices in ((partial(faults.flip, bit=1000), [2, 1]), (os.unlink, [])):
        for path in checkpoints.iterdir():
            damage(path)
        assert main(["--resume", "run"]) == 1
        output, errors = capfd.readouterr()
        assert_one_line_error(errors, "run/checkpoints: no whole checkpoint; put one back")
        said = "NOTICE: run/checkpoints/epoch-{}.npz does not match its SHA-256; it is damaged"
        places = [output.index(said.format(epoch)) for epoch in notices]
        assert (places, output.count("NOTICE")) == (sorted(places), len(notices))


def test_a_checkpoint_of_another_program_is_refused(laboratory):
    """If its arrays do not fit, as after an edit of the program, they are not made to."""
    newer = partial(faults.forge, change=lambda header, _: header.update(format=3))
    laboratory.tampered(newer, "epoch-2.npz has format 3, not 2", status=2)
    other = partial(faults.forge, change=lambda _, x: x.update(key=x["key"].astype(np.int32)))
    laboratory.tampered(other, "epoch-2.npz holds other arrays than this program", status=1)


def test_a_checkpoint_of_an_older_program_goes_on(checkpoints, laboratory, capfd):
    """A flag that is not in it had its default. The damaged config.json is replaced by its copy."""

    def make_older(header, _):
        header["facts"].pop("loss_type")
        header["facts"]["versions"]["jax"] = "0.4.1"

    faults.forge(checkpoints / "epoch-2.npz", make_older)
    Path("run/config.json").write_text("{")
    assert main(["--resume", "run", "--loss-type", "dg"]) == 2
    assert_one_line_error(capfd.readouterr().err, "loss_type was ppo_clip, is dg")
    assert main(["--resume", "run", "--data-dir", "elsewhere", "--output-dir", "run"]) == 0
    output, errors = capfd.readouterr()
    assert (errors, output.count("NOTICE")) == ("", 1)
    assert f"NOTICE: jax was 0.4.1, is {jax.__version__}: results may differ" in output
    assert "Resumed: 2 of 3 epochs are done" in output
    places = {"data_dir": "elsewhere", "resume": "run"}
    expected = read_json(laboratory.finished / "run" / "config.json") | places
    assert read_json("run/config.json") == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resume", "nowhere"], "nowhere is not the directory of a run"),
        (["--resume", "."], ". is not the directory of a run"),
        (["--resume"], "--resume"),
        (["--resume", "run", "--seed", "3"], "in run, seed was 0, is 3; leave that flag out"),
        (["--resume=run", "--baseline=batch"], "baseline was ema, is batch"),
        (["--resume=run", "--num-epochs=-1"], "--num-epochs -1 must be 1 or more"),
        (["--resume=run", "--output-dir=other"], "--output-dir other must be run, as --resume"),
        (["--resume=run", "--num-epochs=ten"], "--num-epochs"),
        (["--resume=edited"], "in edited, num_epochs was 3, is 9"),
    ],
)
def test_a_flag_that_contradicts_the_run_is_refused(flags, words, checkpoints, capfd):
    config = Path(shutil.copytree("run", "edited"), "config.json")
    config.write_text(config.read_text().replace('"num_epochs": 3', '"num_epochs": 9'))
    before = tree(".")
    assert main(flags) == 2
    assert_one_line_error(capfd.readouterr().err, words)
    assert tree(".") == before


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # left to Python to close
def test_a_finished_run_says_so_and_is_left_alone(laboratory, monkeypatch, capfd):
    monkeypatch.chdir(laboratory.finished)
    files = [path for path in Path("run").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    assert main(["--resume", "run", "--num-epochs=3", "--seed=0"]) == 0
    said = "run: this run is finished; nothing is left to do.\n"
    assert capfd.readouterr() == (said, "")
    assert train(load_config(Path("run"))) == read_history("run")
    assert {path: path.read_bytes() for path in files} == before


def test_two_seeds_with_a_reference_go_on_from_python(tmp_path, monkeypatch):
    flags = (*QUICK, "--num-seeds=2", "--beta=0.01", "--ref-sync-epochs=1")
    laboratory = faults.Laboratory(tmp_path, flags, in_process=True)
    place = laboratory.new_place(epoch=1)
    monkeypatch.chdir(place)
    assert train(load_config(Path("run"))) == read_history("run")
    assert faults.outcome(place) == laboratory.expected
