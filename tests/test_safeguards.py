"""Each safeguard of the program, taken out of a copy of it, turns the test that guards it red."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, edited_program

ROLLOUT = "rollout = sample_rollout(state, images, labels, sampling_key, config)\n"
AVERAGE = "average = 0.9 * state.moving_average + 0.1 * rollout.rewards.mean()\n"
TOO_EARLY = (
    f"{ROLLOUT}    {AVERAGE}    state = state._replace(moving_average=average)\n    {ROLLOUT}"
)
STEP = "test_algorithm.py::test_the_step_against_a_numpy_learner"
RUN = "test_checkpoints.py::test_a_run_survives"
SAFEGUARDS = {  # a text of the program, what takes its place, and the test that notices it
    "equal rewards": (
        *("jnp.where(all_equal(rewards, statistic.group)", "jnp.where(False"),
        "test_algorithm.py::test_equal_rewards_give_exactly_zero",
    ),
    "moving average after use": (ROLLOUT, TOO_EARLY, f"{STEP}[moving average]"),
    "sign of the lower clip": (" & (advantages < 0)", "", f"{STEP}[clipping]"),
    "sign of the upper clip": (" & (advantages > 0)", "", f"{STEP}[clipping]"),
    "checksum of data": (
        *('            raise RunError(f"{paths[url]}', '            str(f"{paths[url]}'),
        "test_data.py::test_a_damaged_file_is_named_and_not_trained_on[other labels]",
    ),
    "offline limit": (
        *("asking.get(timeout=7)", "asking.get()"),
        "test_data.py::test_without_a_network_the_decision_falls_within_10_seconds",
    ),
    "digest": (
        "if hashlib.sha256(content[:-32]).digest() ==",
        "if content or",
        f"{RUN}[a bit flipped]",
    ),
    "fsync of a file": ("os.fsync(file.fileno())", "pass", f"{RUN}[power cut]"),
    "fsync of a directory": ("os.fsync(descriptor)", "pass", f"{RUN}[power cut]"),
    "keys": (
        *(
            "[arrays[name] for name in expected]",
            "[(expected if name == 'key' else arrays)[name] for name in expected]",
        ),
        f"{RUN}[resumed after an epoch]",
    ),
    "lock": (
        *('FileLock(run_dir / ".lock", timeout=0).acquire()', "contextlib.nullcontext()"),
        f"{RUN}[a second run]",
    ),
}


@pytest.mark.parametrize("safeguard", SAFEGUARDS)
def test_each_safeguard_turns_a_test_red(safeguard, tmp_path, request, monkeypatch):
    before, after, guard = SAFEGUARDS[safeguard]
    for folder in ("tests", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    edited_program(tmp_path / "grpo_mnist.py", (before, after))
    if safeguard == "checksum of data":
        monkeypatch.setenv("TFDS_DATA_DIR", str(request.getfixturevalue("mnist_dir")))
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "--tb=no", f"tests/{guard}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert " failed" in done.stdout, done.stdout
    assert done.returncode == 1
