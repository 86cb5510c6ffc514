"""A run that is killed, stopped or damaged, and goes on: it ends as the one that nothing befell.

benchmarks/faults.py has what befalls real processes here, and tries it more often.
"""

import dataclasses
import importlib.util
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import jax
import numpy as np
import pytest
from conftest import (
    assert_one_line_error,
    edited_program,
    read_history,
    read_json,
    start_program,
    tree,
)

import grpo_mnist
from grpo_mnist import UsageError, load_config, main, train

FAULTS = {  # 16 operations on the disk end with the report of the first epoch, 27 with the second
    "killed": lambda lab: lab.killed(0.8 * lab.seconds),
    "crash before an old checkpoint is removed": lambda lab: lab.crashed(28, "nothing"),
    "power cut, contents lost": lambda lab: lab.crashed(17, "contents"),
    "power cut, all lost": lambda lab: lab.crashed(17, "all"),
    "resumed after an epoch": lambda lab: lab.resumed_from(1),
    "resumed for the picture alone": lambda lab: lab.resumed_from(3),
    "a bit flipped": lambda lab: lab.damaged(faults.flip(9_999_999), "epoch-2.npz does not match"),
    "full disk": lambda lab: lab.full_disk(epoch=1),
    "directory turned into a file": lambda lab: lab.moved_away(leave_a_file=True),
    "SIGINT": lambda lab: lab.signalled(signal.SIGINT, 0.75 * lab.seconds),
    "SIGTERM": lambda lab: lab.signalled(signal.SIGTERM, 0.85 * lab.seconds),
    "NaN": lambda lab: lab.not_a_number("gradients"),
    "a second run": lambda lab: lab.second_run(epoch=1),
}
SAFEGUARDS = {  # old: new, which takes a safeguard out of the program, but for the first
    "nothing": ('"""Teach ', '"""Teaches '),
    "digest": ("if hashlib.sha256(content[:-32]).digest() == content[-32:]:", "if content:"),
    "sync of contents": ("            os.fsync(file.fileno())\n", ""),
    "sync of names": ("os.fsync(descriptor)", "pass"),
    "random numbers": (
        "[arrays[name] for name in expected]",
        '[(expected if name == "key" else arrays)[name] for name in expected]',
    ),
}
MISSED_BY = {  # the fault above that must not be survived without it
    "nothing": lambda lab, program: lab.crashed(17, "all", program),
    "sync of contents": lambda lab, program: lab.crashed(17, "contents", program),
    "sync of names": lambda lab, program: lab.crashed(17, "all", program),
    "random numbers": lambda lab, program: lab.resumed_from(1, program),
}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    return faults.Laboratory(tmp_path_factory.mktemp("laboratory"))


@pytest.fixture(scope="module")
def outcomes(laboratory, tmp_path_factory, request):
    """Whether all went well, for the faults of the selected tests, two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        futures = {}
        for test in request.session.items:
            is_here = test.path == request.path and hasattr(test, "callspec")
            selected = test.callspec.params if is_here else {}
            if name := selected.get("fault"):
                futures[name] = pool.submit(FAULTS[name], laboratory)
            if name := selected.get("missing"):
                program = without(name, tmp_path_factory.mktemp("program"))
                futures[name] = pool.submit(MISSED_BY[name], laboratory, program)
        yield futures


def without(safeguard, directory):
    """The program with one of its safeguards taken out."""
    return edited_program(directory / "grpo_mnist.py", SAFEGUARDS[safeguard])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_survives(fault, outcomes):
    assert outcomes[fault].result()


@pytest.mark.parametrize("missing", MISSED_BY)
def test_a_run_does_not_survive_without_its_safeguards(missing, outcomes):
    """Each is in the program for one of the faults above, and that test is red without it."""
    assert outcomes[missing].result() is (missing == "nothing")


# --- damaged checkpoints, one by one ---


def count_rejected(program, laboratory, tmp_path):
    """How many of many kinds of damage to the newest checkpoint lead to the one before."""
    place = tmp_path / "place"
    rejected = 0
    shutil.copytree(laboratory.by_epoch[1], place)
    path = place / "run" / "checkpoints" / "epoch-2.npz"
    whole = path.read_bytes()
    kinds = faults.damages(len(whole), truncations=16, flips=200)
    for damage, _ in kinds:
        path.write_bytes(whole)
        damage(path)
        try:
            used = program.newest_checkpoint(place / "run")[0].name
        except Exception as error:
            used = type(error).__name__
        rejected += used == "epoch-1.npz"
    return rejected, len(kinds)


def test_a_damaged_checkpoint_is_never_used(laboratory, tmp_path):
    rejected, tried = count_rejected(grpo_mnist, laboratory, tmp_path)
    assert rejected == tried == 218


def test_damaged_checkpoints_are_used_without_the_digest(laboratory, tmp_path):
    """The test above is red without the digest."""
    path = without("digest", tmp_path)
    specification = importlib.util.spec_from_file_location("without_digest", path)
    program = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(program)
    rejected, tried = count_rejected(program, laboratory, tmp_path)
    assert rejected < tried


@pytest.fixture
def after_two_epochs(laboratory, tmp_path):
    """The directory run, as it was after two epochs of three."""
    shutil.copytree(laboratory.by_epoch[1] / "run", tmp_path / "run")
    return tmp_path / "run" / "checkpoints"


def test_without_a_whole_checkpoint_the_run_does_not_go_on(after_two_epochs, capfd):
    for path in after_two_epochs.iterdir():
        faults.flip(1000)(path)
    assert main(["--resume", "run"]) == 1
    output, errors = capfd.readouterr()
    assert_one_line_error(errors, "run/checkpoints: no whole checkpoint; put one back")
    for name in ("epoch-2.npz", "epoch-1.npz"):
        assert f"NOTICE: run/checkpoints/{name} does not match its SHA-256" in output
    for path in after_two_epochs.iterdir():
        path.unlink()
    assert main(["--resume", "run"]) == 1
    assert_one_line_error(capfd.readouterr().err, "run/checkpoints: no whole checkpoint")


def test_a_newer_format_is_refused(after_two_epochs, capfd):
    faults.forge(after_two_epochs / "epoch-2.npz", faults.newer_format)
    assert main(["--resume", "run"]) == 2
    assert_one_line_error(capfd.readouterr().err, "epoch-2.npz has format 3, not 2")


def test_what_has_changed_since_is_said(after_two_epochs, capfd):
    faults.forge(after_two_epochs / "epoch-2.npz", faults.other_library)
    assert main(["--resume", "run"]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    assert f"NOTICE: jax was 0.4.1, is {jax.__version__}: results may differ" in output
    assert "program_sha256" not in output


def test_a_run_of_a_program_without_a_flag_had_its_default(after_two_epochs, capfd):
    faults.forge(
        after_two_epochs / "epoch-2.npz", lambda header, _: header["facts"].pop("loss_type")
    )
    (after_two_epochs.parent / "config.json").unlink()
    assert main(["--resume", "run", "--loss-type", "dg"]) == 2
    assert_one_line_error(capfd.readouterr().err, "loss_type was ppo_clip, is dg")
    assert main(["--resume", "run"]) == 0


def test_a_checkpoint_of_a_changed_network_is_refused(after_two_epochs, capfd):
    """As after an edit of the file: the arrays do not fit, and are not made to."""

    def halve_precision(_, arrays):
        kernel = "networks.actor.hidden_2.kernel.value"
        arrays[kernel] = arrays[kernel].astype(np.float16)

    faults.forge(after_two_epochs / "epoch-2.npz", halve_precision)
    assert main(["--resume", "run"]) == 1
    assert_one_line_error(
        capfd.readouterr().err, "epoch-2.npz holds other arrays than this program"
    )


def test_a_damaged_config_is_replaced_by_the_checkpoints_copy(after_two_epochs, laboratory, capfd):
    (after_two_epochs.parent / "config.json").write_text("{")
    assert main(["--resume", "run", "--data-dir", "elsewhere", "--output-dir", "run"]) == 0
    assert "Resumed: 2 of 3 epochs are done" in capfd.readouterr().out
    places = {"data_dir": "elsewhere", "resume": "run"}
    assert read_json("run/config.json") == (
        read_json(laboratory.finished / "run" / "config.json") | places
    )


# --- --resume ---


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resume", "nowhere"], "nowhere is not the directory of a run"),
        (["--resume", "."], ". is not the directory of a run"),
        (["--resume"], "--resume"),
        (["--resume", "run", "--seed", "3"], "in run, seed was 0, is 3; leave that flag out"),
        (["--resume=run", "--batch-size=1024"], "batch_size was 8192, is 1024"),
        (["--resume=run", "--baseline=batch"], "baseline was critic, is batch"),
        (["--resume=run", "--num-epochs=-1"], "--num-epochs -1 must be 1 or more"),
        (["--resume=run", "--ref-sync-epochs=0"], "ref_sync_epochs was 2, is 0"),
        (["--resume=run", "--output-dir=other"], "--output-dir other must be run, as --resume"),
        (["--resume=run", "--num-epochs=ten"], "--num-epochs"),
        (["--resume=edited"], "in edited, num_epochs was 3, is 9"),
    ],
)
def test_a_flag_that_contradicts_the_run_is_refused(flags, words, after_two_epochs, capfd):
    config = Path(shutil.copytree("run", "edited"), "config.json")
    config.write_text(config.read_text().replace('"num_epochs": 3', '"num_epochs": 9'))
    before = tree(after_two_epochs.parent.parent)
    assert main(flags) == 2
    assert_one_line_error(capfd.readouterr().err, words)
    assert tree(after_two_epochs.parent.parent) == before


def test_a_field_that_contradicts_the_run_is_refused(after_two_epochs):
    config = dataclasses.replace(load_config(Path("run")), num_epochs=7)
    with pytest.raises(UsageError, match="num_epochs was 3, is 7"):
        train(config)


def test_a_finished_run_says_so_and_is_left_alone(laboratory, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(laboratory.finished)
    files = [path for path in (laboratory.finished / "run").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    assert main(["--resume", "run", "--num-epochs=3", "--seed=0"]) == 0
    output, errors = capfd.readouterr()
    assert (output, errors) == ("run: this run is finished; nothing is left to do.\n", "")
    assert {path: path.read_bytes() for path in files} == before
    metrics = train(load_config(Path("run")))
    assert metrics == read_history("run")


def test_two_seeds_and_a_moving_average_go_on_bit_for_bit(tmp_path):
    """Stopped by a real signal in the second epoch, and resumed from Python."""
    flags = ("--dataset=digits", "--num-epochs=3", "--batch-size=8192", "--num-seeds=2")
    flags += ("--num-iterations=1", "--baseline=ema", "--scale-rewards=none")
    runs = undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert main([*flags, f"--output-dir={undisturbed}"]) == 0
    with start_program(*flags, f"--output-dir={stopped}") as process:
        faults.read_until(process, "Epoch 1/")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
        assert_one_line_error(process.stderr.read(), "stopped by SIGTERM", f"--resume {stopped}")
    assert train(load_config(stopped)) == read_history(stopped)
    summaries = [read_json(run / "summary.json") | {"seconds": None} for run in runs]
    assert summaries[0] == summaries[1]
    assert faults.metrics_without_times(undisturbed) == faults.metrics_without_times(stopped)
    assert tree(undisturbed) == tree(stopped)
    assert (undisturbed / "curves.png").read_bytes() == (stopped / "curves.png").read_bytes()
