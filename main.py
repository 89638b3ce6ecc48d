"""Trains a config, draws samples from the trained model, or scores it: see maskdm_jax/main.py."""

from maskdm_jax.main import main
from maskdm_jax.run import command_line

if __name__ == "__main__":
    command_line.run(main, resumes=True)
