"""Twenty kills, a sample of failed file operations and a thousand steps: tests/reliability.py does more of each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("reliability.py")


@pytest.fixture(scope="module")
def figures() -> dict:
    command = [sys.executable, str(PROGRAM), "--kills", "20", "--faults", "29", "--steps", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(figures: dict) -> None:
    """Twenty SIGKILLs at random: every loss and learning rate, and the result's bytes; LoRA with dropout, and full."""
    kills = figures["kills"]
    assert kills["kills"] == 20 and kills["runs"] >= 2
    assert kills["saving"] >= 8


@pytest.mark.slow
def test_a_run_survives_each_of_its_file_operations_failing(figures: dict) -> None:
    """Killed at it, or refused with exit code 2 and one line; the same command then goes on to the same bits."""
    faults = figures["faults"]
    assert faults["killed"] >= 5 and faults["refused"] >= 10
    assert faults["operations of lora"] > 200 < faults["operations of full"]


@pytest.mark.slow
def test_memory_and_open_files_stay_flat(figures: dict) -> None:
    """Between step 100 and step 1,000, with states saved and validations made in between."""
    long = figures["long"]
    assert long["steps"] == 1000 and long["grown_files"] == 0
    assert long["grown_mib"] < 16
