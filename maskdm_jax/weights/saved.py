"""Saved weights that images are drawn from: a checkpoint of a run, or an official `.pt` file.

`--mode=sample` and `--mode=evaluate` take the checkpoints of the workdir. If it has none, and
`config.init.path` is a file, they take that file, and the workdir holds only what they write.
"""

import contextlib
import functools
import hashlib
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from maskdm_jax import averages, checkpoint, phases
from maskdm_jax.config import as_flags, described, differences, get, whole_images
from maskdm_jax.errors import ConfigError, OtherRecipe, RunError
from maskdm_jax.fields import MEANING, SHAPE
from maskdm_jax.run import distributed, files, hashes
from maskdm_jax.weights import torch_file, torch_io


class Checkpoint(NamedTuple):
    """A checkpoint of a run."""

    workdir: pathlib.Path
    step: int

    @property
    def name(self) -> str:
        """For the folder of its samples."""
        return f"step{self.step}"

    @property
    def where(self) -> str:
        """For messages."""
        return f"checkpoint {self.step} of {self.workdir}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The weights that it has."""
        return ("ema", "raw")

    @property
    def provenance(self) -> dict:
        """What is stored beside its samples."""
        return {"step": self.step, "workdir": str(self.workdir)}

    def fingerprint(self) -> str:
        """A SHA-256 of its content."""
        return hashes.fingerprint(checkpoint.directory(self.workdir) / str(self.step))

    def network(self, config):
        """`config` with the checkpoint's phase, for whole images; raises ConfigError if that
        phase's network differs from what `config` builds."""
        stored = checkpoint.load_config(self.workdir, self.step)
        return phases.of_checkpoint(config, stored, self.step, str(self.workdir))

    def restore(self, config, abstract, weights: str):
        """The weights, "raw", or "ema" for the average of `sample.ema_std`, placed as `abstract`.

        Raises:
          ConfigError: for an average that this run cannot give.
          RunError: if the run that trains there has removed the checkpoint meanwhile.
        """
        try:
            if weights == "raw":
                return checkpoint.restore_item(self.workdir, self.step, "params", abstract)
            std = config.sample.ema_std
            return averages.restore(config, self.workdir, self.step, abstract, std)
        except (FileNotFoundError, ValueError) as error:
            if self.step in checkpoint.steps(self.workdir):
                raise
            raise RunError(
                f"{self.where} was retired meanwhile by the run that trains there; the same "
                "command takes the newest"
            ) from error


class OfficialFile(NamedTuple):
    """An official `.pt` file."""

    path: pathlib.Path

    @property
    def step(self) -> int:
        """Its updates; 0 if the file does not say."""
        step = torch_file.load(str(self.path)).get("step")
        return step if type(step) is int else 0

    @property
    def name(self) -> str:
        return f"official_step{self.step}"

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def kinds(self) -> tuple[str, ...]:
        return _kinds(self.path)

    @property
    def provenance(self) -> dict:
        return {"step": self.step, "init_path": str(self.path), "sha256": self.fingerprint()}

    def fingerprint(self) -> str:
        """The SHA-256 of the file."""
        return _sha256(self.path, self.path.stat().st_mtime_ns)

    def network(self, config):
        """`config` for whole images; raises ConfigError if the file holds another network."""
        config = whole_images(config)
        if config.sample.ema_std:
            raise ConfigError(
                f"sample.ema_std is {config.sample.ema_std:g}, but {self.path} has one average of "
                "its own; type --config.sample.ema_std=0"
            )
        stored = torch_io.config_of(self._read(config.sample.weights), config)
        names = [
            name
            for name in differences(config, stored, (SHAPE, MEANING))
            if name not in config.init.allow
        ]
        if names == ["model.depth"] and config.model.depth // 2 == stored.model.depth // 2:
            names = []  # 12 and 13 build the same blocks
        if names:
            known = [name for name in names if get(stored, name) != "unknown"]
            use = f"{as_flags(stored, known)} to use it" if known else ""
            allow = ", ".join(f"'{name}'" for name in (*config.init.allow, *names))
            allow = f'--config.init.allow="({allow},)" to use it anyway'
            meaning = all(name in differences(config, stored, (MEANING,)) for name in names)
            remedies = [use] * bool(use) + [allow] * meaning
            raise OtherRecipe(
                f"{self.path} holds another network: {described(config, stored, names)}; type "
                f"{', or '.join(remedies)}",
                stored,
                known,
            )
        return config

    def restore(self, config, abstract, weights: str):
        """The weights, "raw" or "ema", placed as `abstract`."""
        params = self._read(weights).params
        if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, abstract):
            raise ConfigError(
                f"{self.path} holds weights that do not form the U-ViT of its width and depth; "
                "expected an official .pt file; type --config.init.path=PATH"
            )

        def placed(array, like):
            array = np.asarray(array, np.float32)
            return jax.make_array_from_callback(like.shape, like.sharding, array.__getitem__)

        return jax.tree.map(placed, params, abstract)

    def _read(self, weights):
        return _read(self.path, weights, self.path.stat().st_mtime_ns)


def find_step(config, workdir: str | pathlib.Path, step: int | None = None) -> int | None:
    """The step of the checkpoint to draw from; None for the file of `init.path`.

    Args:
      config: the run's.
      workdir: the run's folder.
      step: of the checkpoint; None for the newest that is whole, or else the file.

    Raises:
      ConfigError: if there is neither.
    """
    has_checkpoints = bool(distributed.agreed(checkpoint.steps(workdir)))
    (is_file,) = distributed.agreed([_is_file(config.init.path)])
    if step is None and not has_checkpoints and is_file:
        return None
    instead = "the command that trains first, or another --workdir"
    if config.init.path and not has_checkpoints:
        if step is None and not files.place(config.init.path, "init.path").exists():
            raise ConfigError(
                f"init.path {config.init.path} does not exist, and {workdir} holds no checkpoint; "
                "expected an official .pt file, or a trained run; type --config.init.path=PATH"
            )
        instead = f"--workdir={config.init.path} to use that run's, or {instead}"
    return checkpoint.find_step(workdir, step, instead=instead)


def at(config, workdir: str | pathlib.Path, step: int | None) -> Checkpoint | OfficialFile:
    """The weights that `find_step` found."""
    if step is None:
        return OfficialFile(files.local_path(config.init.path, "init.path"))
    return Checkpoint(files.as_place(workdir), step)


def _is_file(path):
    return bool(path) and files.place(path, "init.path").is_file()


@functools.lru_cache(maxsize=2)
def _read(path, weights, modified_ns):
    try:
        return torch_io.load_official(str(path), weights)
    except ValueError as error:
        remedy = "--config.init.path=PATH"
        with contextlib.suppress(ValueError):
            kinds = _kinds(path)
            if kinds and weights not in kinds:
                remedy = f"--config.sample.weights={kinds[0]}, or {remedy}"
        raise ConfigError(
            f"init.path: {error}; expected an official .pt file with tensors only; type {remedy}"
        ) from error


def _kinds(path):
    """The weights of which a file has an entry; raises ValueError for a file that is none."""
    entries = torch_file.load(str(path))
    entries = entries if isinstance(entries, dict) else {}
    return tuple(kind for kind, group in torch_io.GROUPS.items() if entries.get(group))


@functools.lru_cache(maxsize=2)
def _sha256(path, modified_ns):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
