"""The Inception-v3 that FID is defined on, as pytorch-fid runs it, for inference.

TensorFlow's network of 2015-12-05. It differs from torchvision's Inception-v3 in three places:
average pools leave the padding out of the count, the last block pools by maximum, and there are
1,008 classes. Each convolution is followed by a bias, into which batch norm is folded, and a ReLU.
Layers have torchvision's names. Everything is computed in float32, also where JAX's default is less
(TensorFloat-32 on GPUs, bfloat16 on TPUs).
"""

import dataclasses
import functools
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What can be read off the network, in its order: means over positions, named by their number of
# channels as pytorch-fid's --dims, and the inputs of the softmax.
LAYERS = (64, 192, 768, 2048, "logits")
RESIZE = "bilinear to 299x299, half-pixel centres, no antialiasing"

_SIDE = 299
_HIGHEST = jax.lax.Precision.HIGHEST


class InceptionV3(nn.Module):
    """Features of images [B, H, W, 3] in [0, 1], up to the layer `last`.

    Returns a float32 [B, D] for each of LAYERS up to `last`. The logits have no bias, as in the
    definition of the Inception Score (Salimans et al. 2016), and 1,008 columns.
    """

    last: int | str

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> list[jax.Array]:
        found = []
        x = jax.image.resize(
            image_BHWC, (len(image_BHWC), _SIDE, _SIDE, 3), "bilinear", antialias=False
        )
        x = 2 * x - 1
        stages = {64: _stage_64, 192: _stage_192, 768: _stage_768, 2048: _stage_2048}
        for layer, stage in stages.items():
            x = stage(x)
            found.append(x.mean(axis=(1, 2)))
            if layer == self.last:
                return found
        classify = nn.Dense(1008, use_bias=False, precision=_HIGHEST, name="fc")
        return [*found, classify(found[-1])]


def _stage_64(x):
    x = _conv(x, "Conv2d_1a_3x3", 32, 3, stride=2, padding="VALID")
    x = _conv(x, "Conv2d_2a_3x3", 32, 3, padding="VALID")
    x = _conv(x, "Conv2d_2b_3x3", 64, 3)
    return _halved(x)


def _stage_192(x):
    x = _conv(x, "Conv2d_3b_1x1", 80, 1)
    x = _conv(x, "Conv2d_4a_3x3", 192, 3, padding="VALID")
    return _halved(x)


def _stage_768(x):
    for block, pool_channels in (("5b", 32), ("5c", 64), ("5d", 64)):
        x = _block_a(x, f"Mixed_{block}", pool_channels)
    x = _block_b(x, "Mixed_6a")
    for block, channels in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        x = _block_c(x, f"Mixed_{block}", channels)
    return x


def _stage_2048(x):
    x = _block_d(x, "Mixed_7a")
    x = _block_e(x, "Mixed_7b", _average)
    largest = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME")
    return _block_e(x, "Mixed_7c", largest)


def _block_a(x, name, pool_channels):
    conv = _in_block(name)
    one = conv(x, "branch1x1", 64, 1)
    five = conv(x, "branch5x5_1", 48, 1)
    five = conv(five, "branch5x5_2", 64, 5)
    three = conv(x, "branch3x3dbl_1", 64, 1)
    three = conv(three, "branch3x3dbl_2", 96, 3)
    three = conv(three, "branch3x3dbl_3", 96, 3)
    pool = conv(_average(x), "branch_pool", pool_channels, 1)
    return jnp.concatenate([one, five, three, pool], axis=-1)


def _block_b(x, name):
    conv = _in_block(name)
    single = conv(x, "branch3x3", 384, 3, stride=2, padding="VALID")
    double = conv(x, "branch3x3dbl_1", 64, 1)
    double = conv(double, "branch3x3dbl_2", 96, 3)
    double = conv(double, "branch3x3dbl_3", 96, 3, stride=2, padding="VALID")
    return jnp.concatenate([single, double, _halved(x)], axis=-1)


def _block_c(x, name, channels):
    conv = _in_block(name)
    one = conv(x, "branch1x1", 192, 1)
    single = conv(x, "branch7x7_1", channels, 1)
    single = conv(single, "branch7x7_2", channels, (1, 7))
    single = conv(single, "branch7x7_3", 192, (7, 1))
    double = conv(x, "branch7x7dbl_1", channels, 1)
    double = conv(double, "branch7x7dbl_2", channels, (7, 1))
    double = conv(double, "branch7x7dbl_3", channels, (1, 7))
    double = conv(double, "branch7x7dbl_4", channels, (7, 1))
    double = conv(double, "branch7x7dbl_5", 192, (1, 7))
    pool = conv(_average(x), "branch_pool", 192, 1)
    return jnp.concatenate([one, single, double, pool], axis=-1)


def _block_d(x, name):
    conv = _in_block(name)
    three = conv(x, "branch3x3_1", 192, 1)
    three = conv(three, "branch3x3_2", 320, 3, stride=2, padding="VALID")
    seven = conv(x, "branch7x7x3_1", 192, 1)
    seven = conv(seven, "branch7x7x3_2", 192, (1, 7))
    seven = conv(seven, "branch7x7x3_3", 192, (7, 1))
    seven = conv(seven, "branch7x7x3_4", 192, 3, stride=2, padding="VALID")
    return jnp.concatenate([three, seven, _halved(x)], axis=-1)


def _block_e(x, name, pool):
    conv = _in_block(name)
    one = conv(x, "branch1x1", 320, 1)
    single = conv(x, "branch3x3_1", 384, 1)
    double = conv(x, "branch3x3dbl_1", 448, 1)
    double = conv(double, "branch3x3dbl_2", 384, 3)
    parts = [one]
    for branch, stem in ((single, "branch3x3_2"), (double, "branch3x3dbl_3")):
        parts += [conv(branch, f"{stem}a", 384, (1, 3)), conv(branch, f"{stem}b", 384, (3, 1))]
    return jnp.concatenate([*parts, conv(pool(x), "branch_pool", 192, 1)], axis=-1)


def _in_block(name):
    return lambda x, layer, *sizes, **more: _conv(x, f"{name}.{layer}", *sizes, **more)


def _conv(x, name, channels, kernel, stride=1, padding="SAME"):
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    conv = nn.Conv(channels, kernel, stride, padding, precision=_HIGHEST, name=name)
    return nn.relu(conv(x))


def _halved(x):
    return nn.max_pool(x, (3, 3), (2, 2))


def _average(x):
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


@functools.cache
def expected_params(last: int | str) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of the parameters, {layer: {"kernel": HWIO, "bias": O}}; "fc" has a kernel only."""
    image = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), jnp.float32)
    return jax.eval_shape(InceptionV3(last).init, jax.random.key(0), image)["params"]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the network up to the layer `last`, from a file with this SHA-256."""

    params: dict[str, dict[str, np.ndarray]]
    last: int | str
    sha256: str


class Extractor:
    """Computes features of uint8 images on this process's devices, or on those of all processes.

    The last batch is padded to the compiled size, and the padding's features are dropped.

    Args:
      weights: of the network; must reach the deepest of `layers`.
      layers: some of LAYERS.
      batch_size: images at a time, over all devices; rounded up to a multiple of their number.
      devices: default: this process's. With those of several processes, all of them make the
        extractor and call it, with the same images; each computes its share, and gets all features.
    """

    def __init__(self, weights: Weights, layers: tuple, batch_size: int, devices=None):
        devices = jax.local_devices() if devices is None else devices
        self.layers = tuple(sorted(layers, key=LAYERS.index))
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        mesh = Mesh(np.asarray(devices), ("batch",))
        self._rows = NamedSharding(mesh, PartitionSpec("batch"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        used = expected_params(self.layers[-1])
        # From callbacks: `device_put` would compare the bytes across processes.
        self._params = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, everywhere, x.__getitem__),
            {k: weights.params[k] for k in used},
        )
        self._apply = jax.jit(self._features, out_shardings=everywhere)

    def _features(self, params, image_BHWC):
        image = image_BHWC.astype(jnp.float32) / 255
        image = jnp.broadcast_to(image, (*image.shape[:3], 3))  # grey as RGB
        found = InceptionV3(self.layers[-1]).apply({"params": params}, image)
        return [found[LAYERS.index(layer)] for layer in self.layers]

    def __call__(self, image_BHWC: np.ndarray) -> dict[Any, np.ndarray]:
        """{layer: float32 [B, D]} of uint8 images [B, H, W, 1 or 3], at most `batch_size`."""
        count = len(image_BHWC)
        padding = [(0, self.batch_size - count)] + [(0, 0)] * 3
        padded = np.pad(image_BHWC, padding)
        batch = jax.make_array_from_callback(padded.shape, self._rows, padded.__getitem__)
        found = self._apply(self._params, batch)
        return {k: np.asarray(v)[:count] for k, v in zip(self.layers, found, strict=True)}

    def seconds_per_image(self, shape: tuple[int, int, int]) -> float:
        """Compiles for images [H, W, C] and measures one batch of them."""
        image_BHWC = np.zeros((self.batch_size, *shape), np.uint8)
        self(image_BHWC)
        start = time.perf_counter()
        self(image_BHWC)
        return (time.perf_counter() - start) / self.batch_size
