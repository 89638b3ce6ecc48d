"""One update: draw t, masks and noise for the global batch, take the gradient, step, average.

The same function serves both stages; only `config.mask` differs. An update whose loss or gradients
are not finite is not applied.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from maskdm_jax import diffusion, masking, objective, optim, patches, rng, sharding, uvit
from maskdm_jax.model.sizes import grid_shape
from maskdm_jax.state import TrainState


def jit_train_step(
    config,
    mesh: Mesh,
    model: uvit.UViT,
    optimizer: optax.GradientTransformation,
    abstract_state: TrainState,
    materialize: Callable[[dict, dict], dict],
):
    """`make_train_step` under jit on `mesh`: what main.py runs, to be lowered and compiled.

    The state is donated, and comes back laid out as `abstract_state` says.
    """
    alphas_cumprod = diffusion.make_alphas_cumprod(config.diffusion, config.data.image_size)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    return jax.jit(
        make_train_step(config, model, optimizer, alphas_cumprod, materialize),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options=sharding.compiler_options(mesh),
    )


def make_train_step(
    config,
    model: uvit.UViT,
    optimizer: optax.GradientTransformation,
    alphas_cumprod: np.ndarray,
    materialize: Callable[[dict, dict], dict],
) -> Callable[[TrainState, dict, dict], tuple[TrainState, dict]]:
    """The update of one step, to be jitted.

    Args:
      config: the run's config.
      model: from `uvit.make_model`.
      optimizer: from `optim.make_optimizer`.
      alphas_cumprod: float64 [T].
      materialize: (arrays, batch) -> {"image": uint8 [B, H, W, C], "label": int32 [B]}.

    Returns:
      (state, arrays, batch) -> (state, metrics): float32 scalars "loss", "grad_norm" (before
      clipping), "lr", and "skipped": 1 where the loss or the norm is not finite. Of such an update
      only `step` goes on, since all draws and the order of the data follow from it.
    """
    schedule = optim.learning_rate(config)
    micro = config.optim.accumulate_steps

    def loss(params, examples, dropout_key):
        return objective.denoising_loss(
            model,
            params,
            examples["x0"],
            examples["eps"],
            examples["t"],
            alphas_cumprod,
            prediction=config.diffusion.prediction,
            norm=config.diffusion.loss,
            visible_BV=examples.get("visible"),
            label_B=examples.get("label"),
            dropout_key=dropout_key if config.model.dropout else None,
        )

    def gradients(params, examples, dropout_key):
        if micro == 1:
            return jax.value_and_grad(loss)(params, examples, dropout_key)

        def accumulate(total, i_and_part):
            i, part = i_and_part
            value = jax.value_and_grad(loss)(params, part, jax.random.fold_in(dropout_key, i))
            return jax.tree.map(jnp.add, total, value), None

        # Microbatch i takes every micro-th example, so that each device keeps its own examples.
        parts = jax.tree.map(lambda x: x.reshape(-1, micro, *x.shape[1:]).swapaxes(0, 1), examples)
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(accumulate, zero, (jnp.arange(micro), parts))
        return jax.tree.map(lambda x: x / micro, total)

    def train_step(state, arrays, batch):
        examples = draw_examples(config, materialize(arrays, batch), state.step)
        dropout_key = rng.stream(config.seed, "dropout", state.step)
        value, grads = gradients(state.params, examples, dropout_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optim.global_norm(grads)
        applied = is_finite(value, grad_norm)
        updated = TrainState(
            step=state.step + 1,
            params=params,
            ema=optim.update_ema(state.ema, params, state.step, config),
            opt_state=opt_state,
        )
        # The choice is fused into the update's own loops, which read the old values anyway.
        kept = jax.tree.map(lambda new, old: jnp.where(applied, new, old), updated, state)
        new_state = kept.replace(step=updated.step)
        metrics = {
            "loss": value,
            "grad_norm": grad_norm,
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
            "skipped": 1 - applied.astype(jnp.float32),
        }
        return new_state, metrics

    return train_step


def is_finite(loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Whether an update can be applied: bool scalar. One bad gradient makes the norm bad too."""
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm)


def draw_examples(config, batch: dict, step: jax.Array) -> dict:
    """All that a batch's loss needs, drawn from (seed, name, step).

    Args:
      config: the run's config.
      batch: "image" uint8 [B, H, W, C] and "label" int32 [B].
      step: completed updates, int32 scalar.

    Returns:
      "x0" and "eps" float32 [B, V, P], "t" int32 [B]; "visible" int32 [B, V] where patches are
      hidden, and "label" int32 [B] where the model has classes.
    """
    image_BHWC = batch["image"]
    size = image_BHWC.shape[0]

    def key(name):
        return rng.stream(config.seed, name, step)

    examples = {
        "t": jax.random.randint(key("time"), (size,), 0, config.diffusion.num_timesteps),
    }
    if config.data.flip:
        mirrored = jax.random.bernoulli(key("flip"), 0.5, (size, 1, 1, 1))
        image_BHWC = jnp.where(mirrored, image_BHWC[:, :, ::-1], image_BHWC)
    if config.model.num_classes:
        dropped = jax.random.bernoulli(key("class_dropout"), config.model.class_dropout, (size,))
        examples["label"] = jnp.where(dropped, config.model.num_classes, batch["label"])

    grid = grid_shape(config.data.image_size, config.model.patch_size)
    visible_BV = masking.draw_visible_ids(key("mask"), size, config.mask, grid)
    if visible_BV is not None:
        examples["visible"] = visible_BV
    # Gathered as uint8, scaled after: the hidden patches are never converted.
    patch_BNP = patches.patchify(image_BHWC, config.model.patch_size)
    patch_BVP = objective.gather_visible(patch_BNP, visible_BV)
    examples["x0"] = patch_BVP.astype(jnp.float32) / 127.5 - 1
    examples["eps"] = jax.random.normal(key("noise"), patch_BVP.shape)
    return examples
