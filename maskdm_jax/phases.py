"""The phases of a run: stretches of its steps, each with a config of its own.

`config.phases` is a tuple of (share, {field: value}), for example

    ((3, {"mask.kind": "block", "train.batch_size": 512}), (1, {"train.batch_size": 64}))

A phase's config is the run's with those values. Shares are relative to their sum. They divide
`train.num_steps`, or (`phases_by` is "flops") the training FLOPs of that many steps. Without phases
a run is one phase. `transition` leads from one phase to the next.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ml_collections import config_dict

from maskdm_jax import config as config_lib
from maskdm_jax.config import FIELDS, FieldError, get
from maskdm_jax.errors import ConfigError, OtherRecipe
from maskdm_jax.fields import MEANING, SHAPE, UPDATE, nearest_word, quoted

# Besides the fields with the role UPDATE in these groups.
_GROUPS = ("mask", "optim", "diffusion")
_OTHERS = ("mask.hidden", "model.patch_size", "model.remat", "train.batch_size")
# Fields whose weights no rule carries over to patches of another size.
_PATCH_BOUND = ("model.wavelet", "model.coarse")


class Phase(NamedTuple):
    """A stretch of a run.

    Fields:
      index: 0 for the first.
      first_step: the run's completed updates at the start.
      last_step: those at the end.
      config: the phase's; it has no phases, and its `train.num_steps` is that of the whole run.
      first_image: images that the run has read at the start.
      ema_first_step: completed updates when the averaged weights last started anew.
    """

    index: int
    first_step: int
    last_step: int
    config: config_dict.ConfigDict
    first_image: int = 0
    ema_first_step: int = 0

    @property
    def num_steps(self) -> int:
        """Updates of this phase alone."""
        return self.last_step - self.first_step

    def images(self, step: int) -> int:
        """Images that the run has read after `step` updates, of which the last is this phase's."""
        return self.first_image + (step - self.first_step) * self.config.train.batch_size


def phases(config) -> list[Phase]:
    """The phases of a valid config, in order; one, with `config` itself, if it names none.

    Raises:
      ConfigError: for a phase that gets no step.
    """
    if not config.phases:
        return [Phase(0, 0, config.train.num_steps, config)]
    made, first_step, first_image, ema_first_step = [], 0, 0, 0
    for index, (last_step, each) in enumerate(zip(_ends(config), _configs(config), strict=True)):
        if each.optim.ema_at_phase == "restart" or each.optim.ema == "power":
            ema_first_step = first_step
        made.append(Phase(index, first_step, last_step, each, first_image, ema_first_step))
        first_step, first_image = last_step, made[-1].images(last_step)
    return made


def at(config, step: int) -> Phase:
    """The phase whose state a checkpoint of `step` holds: first_step < step <= last_step.

    The first for step 0, and the last for steps beyond its end.
    """
    every = phases(config)
    return next((phase for phase in every if step <= phase.last_step), every[-1])


def of_checkpoint(config, stored, step: int, where: str) -> config_dict.ConfigDict:
    """`config` as the phase has it that a checkpoint is from, for drawing and scoring whole images.

    Args:
      config: as typed.
      stored: the config that is stored in the checkpoint; its phases count.
      step: the checkpoint's.
      where: the run's folder.

    Raises:
      OtherRecipe: if that phase's network differs from what `config` builds.
    """
    phase = at(stored, step)
    changes = stored.phases[phase.index][1] if stored.phases else {}
    config = config_lib.whole_images(_changed(config, changes))
    there = config_lib.whole_images(phase.config)
    config_lib.check_same_architecture(config, there, where, "the --workdir of another run")
    return config


def check_resumes(config, stored, step: int, where: str) -> None:
    """Raises ConfigError if a run of `config` cannot continue from a checkpoint of other phases.

    Args: as for `of_checkpoint`.
    """
    here, there = at(config, step), at(stored, step)
    names = config_lib.differences(here.config, there.config, (SHAPE, MEANING))
    run = ("phases", "phases_by", "train.num_steps")
    plan = [name for name in run if get(config, name) != get(stored, name)]
    if not names and config.optim.ema == "power" and here.ema_first_step != there.ema_first_step:
        raise ConfigError(
            f"phase {here.index + 1} starts after step {here.first_step} here, but after step "
            f"{there.first_step} in the checkpoint of step {step} in {where}, whose power averages "
            f"began there; type {config_lib.as_flags(stored, plan)} to go on with them, or another "
            "--workdir to start afresh"
        )
    if not names:
        return
    typed = [n for n in names if not can_change(n)] + (plan or [n for n in names if can_change(n)])
    raise OtherRecipe(
        f"the checkpoint of step {step} in {where} is from a phase with another network: "
        f"{config_lib.described(here.config, there.config, names)}; type "
        f"{config_lib.as_flags(stored, typed)} to use it, or another --workdir to start afresh",
        stored,
        typed,
    )


def going_back(config, stored, step: int) -> str:
    """What to know of a resumed run that is in an earlier phase than its checkpoint; else "".

    Args: as for `of_checkpoint`.
    """
    here, there = at(config, step), at(stored, step)
    changes, before = ([changed for _, changed in c.phases] for c in (config, stored))
    more = config.train.num_steps - stored.train.num_steps
    if here.index >= there.index or changes != before or more < 0:  # other phases were meant
        return ""
    goes_on = config.copy_and_resolve_references()
    steps = [phase.num_steps for phase in phases(stored)]
    steps[there.index] += more
    goes_on.update(phases_by="steps", phases=tuple(zip(steps, changes, strict=True)))
    return (
        f"the checkpoint of step {step} is from phase {there.index + 1}, but here phase "
        f"{here.index + 1} lasts until step {here.last_step}, and the run goes back to it; to go "
        f"on with phase {there.index + 1}, stop and type "
        f"{config_lib.as_flags(goes_on, ('phases_by', 'phases'))}"
    )


def can_change(name: str) -> bool:
    """Whether a phase may set the field `name`."""
    if name in _OTHERS:
        return name in FIELDS
    return FIELDS[name].role is UPDATE and name.partition(".")[0] in _GROUPS


def validate(config) -> None:
    """Raises ConfigError for the first value of a run's config that cannot work, in any phase."""
    if not config.phases:
        _validate_phase(config)
        return
    config_lib.validate_values(config)
    for index, (_, changes) in enumerate(config.phases):
        for name, value in changes.items():
            _check_change(config, index, name, value)
    _in_each_phase(config, _configs(config), _validate_phase)
    _check_patches(config)
    phases(config)


def _validate_phase(config):
    config_lib.validate(config)
    if config.model.coarse:
        from maskdm_jax import denoiser  # imports JAX, see `_costs`

        denoiser.validate(config)


def validate_devices(config, num_devices: int, mode: str) -> None:
    """`config.validate_devices` for each phase of a run."""

    def check(each):
        config_lib.validate_devices(each, num_devices, mode)

    _in_each_phase(config, [phase.config for phase in phases(config)], check)


def with_changes(config, indices: Iterable[int], changes: dict) -> tuple:
    """`config.phases` with further `changes` in the phases of those indices."""
    chosen = set(indices)
    return tuple(
        (share, now | changes if index in chosen else now)
        for index, (share, now) in enumerate(config.phases)
    )


def _configs(config):
    return [_changed(config, changes) for _, changes in config.phases]


def _changed(config, changes):
    config = config.copy_and_resolve_references()
    config.phases = ()
    config.update_from_flattened_dict(changes)
    return config


def _ends(config):
    """The last step of each phase."""
    weights = [share / cost for (share, _), cost in zip(config.phases, _costs(config), strict=True)]
    total, num_steps = sum(weights), config.train.num_steps
    # Rounded half up: a phase that is due a whole step or more gets one.
    ends = [int(num_steps * part / total + 0.5) for part in itertools.accumulate(weights)][:-1]
    ends.append(num_steps)
    for index, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        if end <= start:
            needed = int(total / min(weights)) + 1
            raise ConfigError(
                f"phase {index + 1} of phases gets none of the {num_steps} updates; expected at "
                f"least one for each; type --config.train.num_steps={needed}, or another "
                "--config.phases"
            )
    return ends


def _costs(config):
    """What a step of each phase costs, in the unit of `phases_by`."""
    if config.phases_by == "steps":
        return [1] * len(config.phases)
    from maskdm_jax import flops  # imports JAX, which nothing else here needs

    return [flops.training_flops(each) * each.train.batch_size for each in _configs(config)]


def _check_change(config, index, name, value):
    if name in FIELDS and not config_lib.is_used(config, name):
        fixed = tuple(
            (share, {k: v for k, v in changes.items() if config_lib.is_used(config, k)})
            for share, changes in config.phases
        )
        raise ConfigError(
            f"phase {index + 1} of phases sets {name}, which diffusion.framework="
            f"{config.diffusion.framework} does not use; expected fields that it uses; type "
            f"--config.phases={quoted(fixed)}"
        )
    changeable = [f for f in FIELDS if can_change(f) and config_lib.is_used(config, f)]
    if name not in changeable:
        share, changes = config.phases[index]
        kept = {k: v for k, v in changes.items() if k != name}
        leaves = {field.rpartition(".")[2]: field for field in changeable}
        near = leaves.get(name.rpartition(".")[2]) or nearest_word(name, changeable)
        fault = "no phase can change" if name in FIELDS else "is not a field"
        if near and near not in changes and FIELDS[near].kind.accepts(value):
            kept[near] = value
        fixed = (*config.phases[:index], (share, kept), *config.phases[index + 1 :])
        raise ConfigError(
            f"phase {index + 1} of phases sets {name}, which {fault}; expected model.patch_size, "
            "model.remat, train.batch_size, or a field of mask, optim or diffusion that changes no "
            "parameter's meaning and no state of the optimizer; type "
            f"--config.phases={quoted(fixed)}"
        )
    kind = FIELDS[name].kind
    if not kind.accepts(value):
        suggestion = kind.nearest(value, FIELDS[name].default)
        problem = f"{name} is {value!r}; expected {kind.expected}"
        _refuse(config, index, FieldError(name, problem, suggestion))


def _in_each_phase(config, configs, check: Callable) -> None:
    """Runs `check` on the configs; an error of a field that phases change names the first phase
    that has it, unless all have it alike from the run's config."""
    errors = {}
    for index, each in enumerate(configs):
        try:
            check(each)
        except FieldError as error:
            errors[index] = error
    if not errors:
        return
    index, error = next(iter(errors.items()))
    is_set = any(error.name in changes for _, changes in config.phases)
    is_alike = all(each.name == error.name for each in errors.values())
    is_in_all = len(errors) == len(config.phases) and is_alike
    if not config.phases or not can_change(error.name) or (is_in_all and not is_set):
        raise error
    _refuse(config, index, error)


def _refuse(config, index, error):
    fixed = with_changes(config, [index], {error.name: error.suggestion})
    raise ConfigError(
        f"phase {index + 1} of phases: {error.problem}; type --config.phases={quoted(fixed)}"
    ) from error


def _check_patches(config):
    sizes = [each.model.patch_size for each in _configs(config)]
    for index, (before, size) in enumerate(itertools.pairwise(sizes), 1):
        set_by = [n for n in _PATCH_BOUND if get(config, n) != FIELDS[n].default]
        if size != before and set_by:
            problem = (
                f"model.patch_size is {size} after {before}; expected the same with "
                f"{set_by[0]}={get(config, set_by[0])}, whose weights have no rule for another one"
            )
            _refuse(config, index, FieldError("model.patch_size", problem, before))
        if size % before and before % size:
            problem = f"model.patch_size is {size} after {before}; expected a multiple or a divisor"
            _refuse(config, index, FieldError("model.patch_size", problem, before))
