"""The sets of images that a run's samples are compared with."""

from maskdm_jax.config import default_config
from maskdm_jax.data import sources
from maskdm_jax.errors import ConfigError
from maskdm_jax.quality import reference
from maskdm_jax.run import progress


def reference_set(config):
    """`eval.reference`, or the whole split of the training images."""
    if config.eval.reference:
        return reference.open_set(config.eval.reference, "eval.reference")
    whole = config.copy_and_resolve_references()
    whole.data.fraction = 1.0
    return as_set(config, sources.open_source(whole))


def as_set(config, source) -> reference.Images:
    """The images of a `data.sources.Source`; what is measured of them is kept beside its cache."""
    return reference.Images(
        f"{config.data.name}, split {source.split}",
        source.image_shape,
        len(source),
        lambda index: source[index]["image"],
        source.cache_dir / f"{source.variant}-measured-{source.version}",
    )


def open_heldout(config):
    """The held-out split; None, with a remark, if the data set has none."""
    split = config.eval.heldout_split
    if not split:
        return None
    if split == config.data.split:
        progress.remark(
            f"eval.heldout_split {split} is the split of the training images: scores come without "
            "held-out loss, floor and memorisation"
        )
        return None
    held = config.copy_and_resolve_references()
    held.data.update(split=split, fraction=1.0)
    try:
        return sources.open_source(held)
    except sources.NoSplitError as error:
        if split != default_config().eval.heldout_split:
            raise ConfigError(str(error).replace("data.split", "eval.heldout_split")) from error
        progress.remark(
            f"{config.data.name} has no split {split} (eval.heldout_split): scores come without "
            "held-out loss, floor and memorisation"
        )
        return None
