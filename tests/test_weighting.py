import types

import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from test_samplers import edm

from maskdm_jax.diffusion import make_process, objective, process, weighting

T = jnp.asarray([0, 100, 500, 800, 999])


def settings(kind, prediction="eps", min_snr_gamma=5.0, sigmoid_bias=-1.0):
    return types.SimpleNamespace(
        framework="ddpm",
        schedule="cosine",
        num_timesteps=1000,
        prediction=prediction,
        loss_weight=kind,
        min_snr_gamma=min_snr_gamma,
        sigmoid_bias=sigmoid_bias,
    )


def level_of(diffusion):
    return make_process(diffusion, (64, 64)).at(T)


def snr_of(level):
    return (np.float64(level.signal) / np.float64(level.noise)) ** 2


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_weights_are_those_of_the_paper(prediction, gamma):
    diffusion = settings("min_snr", prediction, min_snr_gamma=gamma)
    level = level_of(diffusion)
    snr = snr_of(level)
    expected = np.minimum(snr, gamma) / {"x0": 1, "eps": snr, "v": snr + 1}[prediction]
    np.testing.assert_allclose(weighting.loss_weight(diffusion)(level), expected, rtol=1e-5)


@pytest.mark.parametrize("bias", [-3.0, 2.0])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_sigmoid_weights_are_those_of_the_paper(prediction, bias):
    diffusion = settings("sigmoid", prediction, sigmoid_bias=bias)
    level = level_of(diffusion)
    snr = snr_of(level)
    of_eps = 1 / (1 + snr * np.exp(-bias))
    expected = of_eps * {"eps": 1, "x0": snr, "v": snr / (snr + 1)}[prediction]
    np.testing.assert_allclose(weighting.loss_weight(diffusion)(level), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["min_snr", "sigmoid"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "edm"])
def test_an_error_of_x0_costs_the_same_whatever_the_network_predicts(kind, prediction):
    # EDM's levels do not preserve variance; x_t / sqrt(1 + sigma^2) has the SNR of the others.
    ddpm = level_of(settings(kind))
    sigma = ddpm.noise / ddpm.signal
    level = edm().at(sigma) if prediction == "edm" else level_of(settings(kind, prediction))
    x0, x_t, wrong = np.random.default_rng(0).normal(size=(3, len(T)))
    # The outputs that stand for x0 and for x0 + wrong, with the eps that x_t then implies.
    signal, noise = np.float64(level.signal), np.float64(level.noise)
    outputs = [level.p * x + level.q * (x_t - signal * x) / noise for x in (x0, x0 + wrong)]
    cost = weighting.loss_weight(settings(kind))(level) * (outputs[1] - outputs[0]) ** 2
    snr = snr_of(ddpm)
    of_x0 = np.minimum(snr, 5) if kind == "min_snr" else snr / (1 + snr * np.e)
    np.testing.assert_allclose(cost, of_x0 * wrong**2, rtol=1e-4)


def test_the_loss_of_each_image_is_multiplied_by_the_weight_of_its_level():
    diffusion = settings("min_snr", "v")
    made = make_process(diffusion, (64, 64))
    x0, eps = np.random.default_rng(0).normal(size=(2, len(T), 4, 3)).astype(np.float32)

    def loss(weight):
        return objective.denoising_loss(lambda x, t: 0.5 * x, made, x0, eps, T, weight=weight)

    weight = weighting.loss_weight(diffusion)
    assert_close(loss(weight), loss(None) * weight(made.at(T)), 1e-6)
    assert weighting.loss_weight(settings("uniform")) is None


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_perturbed_noise_enters_the_input_and_not_the_target(prediction):
    made = make_process(settings("uniform", prediction), (64, 64))
    x0, eps, other = np.random.default_rng(0).normal(size=(3, len(T), 4, 3)).astype(np.float32)
    level = made.at(T)
    seen = []

    def predict(x_BVP, time_B):
        seen.append(x_BVP)
        return process.target(level, x0, eps)

    loss_B = objective.denoising_loss(predict, made, x0, eps, T, input_eps_BVP=other)
    assert not loss_B.any()  # the output is the target of eps
    assert_close(seen[0], process.noised(level, x0, other), 1e-6)
