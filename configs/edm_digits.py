"""EDM beside DDPM: the same network on whole digits for equally many steps, from fresh weights.

The arguments differ in `diffusion` alone: EDM, and DDPM (cosine) that predicts eps or v.

Command:  python main.py --config=configs/edm_digits.py:edm --workdir=W
          and the same with :ddpm_eps and :ddpm_v; see docs/edm.md
Device:   2 CPU cores, minutes each
Expected: swd at the end, in two seeds: edm 50 and 46, ddpm_eps 49 and 65, ddpm_v 43 and 42; see
          docs/edm.md
"""

from configs import scratch_digits

ARGUMENTS = ("edm", "ddpm_eps", "ddpm_v")


def get_config(argument):
    config = scratch_digits.get_config()
    if argument == "edm":
        config.diffusion.framework = "edm"
        config.diffusion.sigma_data = 0.75  # the standard deviation of the digits' pixels
    else:
        config.diffusion.prediction = argument.removeprefix("ddpm_")
    config.train.sample_every_steps = 0
    config.sample.sampler = "ddim"
    config.sample.eta = 0.0
    config.sample.preview_steps = 50
    config.sample.guidance_scale = 1.0
    config.eval.every_steps = 440
    config.eval.num_in_training = 640
    return config
