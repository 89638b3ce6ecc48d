"""Every row of the table of wrong inputs, through the programs themselves."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_every_wrong_input_is_answered_with_what_was_given_and_what_to_type():
    # A process that has not used JAX yet, since the rows run in forks of it.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "tests/wrong_inputs.py"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    answers = done.stdout.split("\nSHORT ")
    assert done.returncode == 0, "\n".join(answers[1:])[-5000:] + done.stderr
    assert int(done.stdout.split()[-3]) >= 230
