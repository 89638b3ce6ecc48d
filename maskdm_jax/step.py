"""One update: draw t, masks and noise for the global batch; then gradient, optimizer and EMA.

The same function serves all stages and phases, which differ in their configs. An update with a
non-finite loss or gradient is not applied.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from maskdm_jax import denoiser, optim, rng, sharding
from maskdm_jax import state as state_lib
from maskdm_jax.data import batch as batch_lib
from maskdm_jax.diffusion import level_normal, make_process
from maskdm_jax.diffusion.objective import denoising_loss
from maskdm_jax.diffusion.weighting import loss_weight
from maskdm_jax.model import masking, patches, uvit
from maskdm_jax.model.sizes import grid_shape
from maskdm_jax.phases import Phase
from maskdm_jax.state import TrainState

# JAX's compilation cache does not find a program with Hopper kernels again in the same process: JAX
# 0.11 numbers all kernels of a process, and the number becomes part of the program.
_jitted = weakref.WeakValueDictionary()


class Plan(NamedTuple):
    """A run's seed, and a phase's first steps, learning rate and distribution of noise levels.

    All are scalars and inputs of the program. So runs and phases that differ only in these, or in
    how long they are, share one program, and JAX's compilation cache has it for all of them.
    """

    seed: jax.Array
    first_step: jax.Array
    ema_first_step: jax.Array
    rate: optim.Schedule
    levels: tuple[jax.Array, jax.Array]  # `diffusion.level_normal`


def jit_train_step(phase: Phase, mesh: Mesh):
    """The update of a phase under jit on `mesh`, as main.py runs it.

    Returns:
      (state, arrays, batch, plan) -> (state, metrics), see `make_train_step`; `data.batch` defines
      arrays and batch. The state is donated, and the new one has the same shardings. As long as
      somebody holds it, phases that differ in the plan alone get the same one, compiled once.
    """
    config = phase.config.copy_and_resolve_references()
    config.seed, config.train.num_steps, config.phases_by = 0, 1, "steps"
    config.optim.update(lr_peak=0.0, lr_end=0.0, warmup_steps=0, lr_decay_share=0.0)
    config.diffusion.update(draw_mean=0.0, draw_std=0.0, edm_mean=0.0, edm_std=0.0)
    program = FrozenConfigDict(config), mesh
    jitted = _jitted.get(program)
    if jitted is None:
        abstract = state_lib.abstract_state(phase.config, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        jitted = _jitted[program] = jax.jit(
            make_train_step(config, mesh),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
            compiler_options=sharding.compiler_options(mesh),
        )
    return jitted


def planned(phase: Phase, mesh: Mesh) -> Plan:
    """The plan of a phase, on the devices of `mesh`."""
    return jax.device_put(_plan(phase), sharding.replicated(mesh))


def _plan(phase):
    begins = np.int32(phase.first_step), np.int32(phase.ema_first_step)
    rate = optim.schedule(phase.config, phase.num_steps)
    levels = tuple(map(np.float32, level_normal(phase.config.diffusion)))
    return Plan(np.int32(phase.config.seed), *begins, rate, levels)


def lower_train_step(phase: Phase, mesh: Mesh, num_examples: int):
    """`jit_train_step` lowered from shapes alone, for a data set of `num_examples` images."""
    arrays, batch = batch_lib.abstract_inputs(phase.config, num_examples, mesh)
    state = state_lib.abstract_state(phase.config, mesh)
    plan = sharding.abstract(lambda: jax.tree.map(jnp.asarray, _plan(phase)), mesh)
    return jit_train_step(phase, mesh).lower(state, arrays, batch, plan)


def make_train_step(
    config, mesh: Mesh
) -> Callable[[TrainState, dict, dict, Plan], tuple[TrainState, dict]]:
    """Makes the update of one step of a phase, to be jitted; `config` is the phase's.

    Random draws depend on the plan's seed and levels, not the config's, and on the run's step; the
    learning rate depends on the step within the phase.

    Returns:
      (state, arrays, batch, plan) -> (state, metrics). The metrics are float32 scalars: "loss",
      "grad_norm" (before clipping), "lr", and "skipped", 1 if the loss or the norm is not finite. A
      skipped update still advances `step`, which the random draws, the data order and the learning
      rate depend on.
    """

    def train_step(state, arrays, batch, plan):
        process = make_process(config.diffusion, config.data.image_size, plan.levels)
        loss = _make_loss(config, mesh, process)
        batch = batch_lib.materialize(config, arrays, batch)
        examples = draw_examples(config, process, batch, plan.seed, state.step)
        dropout_key = rng.stream(plan.seed, "dropout", state.step)
        value, grads = value_and_gradient(
            loss, state.params, examples, dropout_key, config.optim.accumulate_steps
        )
        optimizer = optim.make_optimizer(config, plan.rate)
        count = state.step - plan.first_step
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, count=count)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optim.global_norm(grads)
        applied = is_finite(value, grad_norm)
        updated = TrainState(
            step=state.step + 1,
            params=params,
            ema=optim.update_ema(state.ema, params, state.step - plan.ema_first_step, config),
            opt_state=opt_state,
        )
        # XLA fuses this choice into the update's own loops, which read the old values anyway.
        kept = jax.tree.map(lambda new, old: jnp.where(applied, new, old), updated, state)
        new_state = kept.replace(step=updated.step)
        metrics = {
            "loss": value,
            "grad_norm": grad_norm,
            "lr": optim.learning_rate(config.optim.lr_schedule, plan.rate, count),
            "skipped": 1 - applied.astype(jnp.float32),
        }
        return new_state, metrics

    return train_step


def _make_loss(config, mesh, process):
    """(params, examples of `draw_examples`, dropout_key) -> the loss, float32 scalar."""
    model, weight = uvit.make_model(config, mesh), loss_weight(config.diffusion)
    grid = grid_shape(config.data.image_size, config.model.patch_size)
    num_pooled = masking.num_pooled(config.mask, grid)
    tiers = denoiser.tiers(config)

    def loss(params, examples, dropout_key):
        def of_tier(tier, given, num_pooled=0):
            def predict(x_BVP, time_B):
                return uvit.apply(
                    model,
                    params,
                    x_BVP,
                    time_B,
                    visible_BV=given.get("visible"),
                    pooled_BG=given.get("pooled"),
                    label_B=given.get("label"),
                    dropout_key=dropout_key if config.model.dropout else None,
                    coarse=tier.size if tier.size > 1 else 0,
                )

            loss_B = denoising_loss(
                predict,
                process,
                given["x0"],
                given["eps"],
                given["t"],
                config.diffusion.loss,
                weight=weight,
                input_eps_BVP=given.get("input_eps"),
                num_pooled=num_pooled,
                pool_weight=config.mask.pool_weight,
            )
            return jnp.mean(loss_B)

        first, *coarse = tiers
        value = of_tier(first, examples, num_pooled)
        if not coarse:
            return value
        # As if each image had one level, drawn from all.
        value *= process.share(first.low, first.high)
        for tier in coarse:
            share = process.share(tier.low, tier.high)
            value += share * of_tier(tier, examples[f"coarse_{tier.size}"])
        return value

    return loss


def value_and_gradient(loss, params, examples: dict, key: jax.Array, num_parts: int):
    """(loss, gradient), accumulated over `num_parts` parts of the batch.

    Args:
      loss: (params, examples, key) -> the mean over the examples, float32 scalar.
      params: the tree to differentiate with respect to.
      examples: arrays [B, ...], whose B may differ; `num_parts` must divide each.
      key: for the random draws of `loss`; each part folds in its index.
      num_parts: 1 for the whole batch at once.
    """
    gradient = jax.value_and_grad(loss)
    if num_parts == 1:
        return gradient(params, examples, key)

    def accumulate(total, i_and_part):
        i, part = i_and_part
        value = gradient(params, part, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, total, value), None

    # Part i takes every num_parts-th example, so that each device keeps its own examples.
    parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), examples)
    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(accumulate, zero, (jnp.arange(num_parts), parts))
    return jax.tree.map(lambda x: x / num_parts, total)


def is_finite(loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Whether to apply an update, a bool scalar. One non-finite gradient makes the norm so too."""
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm)


def draw_examples(config, process, batch: dict, seed, step: jax.Array) -> dict:
    """Everything the loss of a batch needs, drawn from (seed, name, step).

    Args:
      config: the run's config.
      process: the config's noise process.
      batch: "image" uint8 [B, H, W, C] and "label" int32 [B].
      seed: the run's, an int or a traced int32 scalar.
      step: completed updates, int32 scalar.

    Returns:
      "x0" and "eps" float32 [B, V, P], "t" [B]; "visible" int32 [B, V] if patches are hidden,
      "label" int32 [B] if the model has classes, and "input_eps", of eps's shape, if the input is
      perturbed (Ning et al. 2023): the noise of the network's input, eps + gamma xi. With pooled
      tokens, "pooled" int32 [B, G] too, and "x0" and "eps" are [B, V + G, P], patches first. With
      coarse tokens of q x q patches, "coarse_q" has the same for every `diffusion.coarse_every`-th
      image, n of them, at another level, with "x0" and "eps" [n, N / q^2, P], see `denoiser`.
    """
    image_BHWC = batch["image"]
    size = image_BHWC.shape[0]

    def key(name):
        return rng.stream(seed, name, step)

    first, *coarse = denoiser.tiers(config)
    examples = {"t": process.draw(key("time"), size, first.low, first.high)}
    if config.data.flip:
        flipped = jax.random.bernoulli(key("flip"), 0.5, (size, 1, 1, 1))
        image_BHWC = jnp.where(flipped, image_BHWC[:, :, ::-1], image_BHWC)
    if config.model.num_classes:
        dropped = jax.random.bernoulli(key("class_dropout"), config.model.class_dropout, (size,))
        examples["label"] = jnp.where(dropped, config.model.num_classes, batch["label"])

    grid = grid_shape(config.data.image_size, config.model.patch_size)
    visible_BV = masking.draw_visible_ids(key("mask"), size, config.mask, grid)
    if visible_BV is not None:
        examples["visible"] = visible_BV
    examples["x0"] = patches.cut(image_BHWC, config.model.patch_size, visible_BV)
    examples["eps"] = jax.random.normal(key("noise"), examples["x0"].shape)
    pooled_BG = masking.draw_pooled_ids(key("mask"), size, config.mask, grid)
    if pooled_BG is not None:
        q = config.mask.pool_size
        x0_BGP = patches.pool(image_BHWC, config.model.patch_size, q, pooled_BG)
        # The average of q^2 unit normals, drawn as such: noisy pooled values have exactly the
        # distribution of averages of noisy pixels, and no noise is drawn for hidden pixels.
        eps_BGP = jax.random.normal(key("pooled_noise"), x0_BGP.shape) / q
        examples["pooled"] = pooled_BG
        examples["x0"] = jnp.concatenate([examples["x0"], x0_BGP], axis=1)
        examples["eps"] = jnp.concatenate([examples["eps"], eps_BGP], axis=1)
    if gamma := config.diffusion.input_perturbation:
        xi = jax.random.normal(key("input_perturbation"), examples["x0"].shape)
        if pooled_BG is not None:  # averages of xi too
            xi = xi.at[:, -pooled_BG.shape[1] :].divide(config.mask.pool_size)
        examples["input_eps"] = examples["eps"] + gamma * xi
    for tier in coarse:
        name, q, every = f"coarse_{tier.size}", tier.size, config.diffusion.coarse_every
        x0_BGP = patches.pool(image_BHWC[::every], config.model.patch_size, q)
        eps_BGP = jax.random.normal(key(f"{name}_noise"), x0_BGP.shape) / q
        t_B = process.draw(key(f"{name}_time"), len(x0_BGP), tier.low, tier.high)
        examples[name] = {"x0": x0_BGP, "eps": eps_BGP, "t": t_B}
        if config.model.num_classes:
            examples[name]["label"] = examples["label"][::every]
        if gamma:
            xi = jax.random.normal(key(f"{name}_input_perturbation"), x0_BGP.shape) / q
            examples[name]["input_eps"] = eps_BGP + gamma * xi
    return examples
