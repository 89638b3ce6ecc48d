"""Flags on the command line: a bad one is one sentence."""

from absl import flags

from maskdm_jax.config import ConfigError


def parse(argv: list[str], required: tuple[str, ...], example: str) -> list[str]:
    """Parses the flags, among them a `--config`; for `app.run`.

    Args:
      argv: the command line.
      required: flags that must be given.
      example: a command that has them.

    Returns:
      What is left of `argv`.

    Raises:
      ConfigError: for a bad flag, or a config that cannot be loaded.
    """
    try:
        left = flags.FLAGS(argv)
        if flags.FLAGS.config is not None:
            flags.FLAGS.config["seed"]  # a file that failed to load says so here
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except (OSError, SyntaxError, ImportError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(
            f"--config cannot be loaded: {reason}; type --config=configs/NAME.py"
        ) from error
    except (AttributeError, KeyError) as error:
        # ml-collections quotes its message twice, so its line break is a backslash and an n.
        hint = str(error.args[0]).replace("\\n", ". ").replace("\\'", "").strip("'")
        hint = ". ".join(line.strip("' ") for line in hint.splitlines())
        raise ConfigError(
            f"unknown config field {hint}; maskdm_jax/config.py documents every field"
        ) from error
    for flag in required:
        if not flags.FLAGS[flag].value:
            raise ConfigError(f"--{flag} is missing; type: {example}")
    return left
