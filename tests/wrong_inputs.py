"""A table of wrong inputs: what each must be answered with. `python tests/wrong_inputs.py [WORD]`.

Every wrong input ends with one sentence on stderr, "error: ...", and an exit code of
docs/resume.md's table. The sentence has the given value, what is expected, and what to type; what
it says to type is itself accepted. This script runs each row (those whose label has WORD in it) and
prints the answers; test_wrong_inputs.py does the same in `make test-slow`.

The rows run in forks of one process that has imported the libraries: a tenth of a second each
instead of several.
"""

import base64
import contextlib
import dataclasses
import os
import pathlib
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import zipfile

ROOT = pathlib.Path(__file__).parents[1]
TINY = (
    "--config.model.width=32 --config.model.depth=3 --config.model.num_heads=2 "
    "--config.train.batch_size=16 --config.train.num_steps=1"
)
DATA = "--config.data.dir={tmp}/data"
MAIN = f"main.py --config=configs/pretrain_digits.py --workdir={{tmp}}/w {DATA} {TINY} "
TUNE = MAIN.replace("pretrain", "finetune")
POOL = MAIN + "--config.mask.kind=block --config.mask.hidden=pool "
SAMPLE = MAIN.replace("{tmp}/w", "{tmp}/run") + "--mode=sample --config.sample.num=1 "
EDM = "--config.diffusion.framework=edm "
COMPILE = "launch/compile_check.py --config=configs/pretrain_digits.py "
# Added to a command that is answered with "type --config.FIELD=VALUE": the next refusal, which
# comes after all checks of the config, must then be this one.
STOP = " --workdir={tmp}/a_file"


@dataclasses.dataclass(frozen=True)
class Wrong:
    """One wrong input.

    Fields:
      command: the program and its arguments, quoted as in a shell; {tmp} is the folder of `make`.
      says: what the sentence must contain: the given value, and what to type.
      code: the exit code.
      retry: arguments to add to what the sentence says to type; None: that is not tried.
      instead: whether it is typed in place of the last argument, not after it.
      after: what the sentence of that second attempt must contain.
      env: environment variables, {tmp} as in `command`; such a row runs in a process of its own.
      lines: further lines on stderr, besides the sentence.
    """

    command: str
    says: tuple[str, ...]
    code: int = 2
    retry: str | None = None
    instead: bool = False
    after: str = "--workdir"
    env: tuple[tuple[str, str], ...] = ()
    lines: int = 0

    @property
    def label(self) -> str:
        for start in (MAIN, TUNE, SAMPLE, COMPILE):
            if self.command.startswith(start):
                name = {MAIN: "main", TUNE: "finetune", SAMPLE: "sample", COMPILE: "compile"}[start]
                return f"{name} {self.command.removeprefix(start)}"
        return self.command


def setting(arguments: str, *says: str) -> Wrong:
    """A wrong value of a field: what the sentence says to type must pass all checks."""
    return Wrong(MAIN + arguments, says, retry=STOP)


def unknown(arguments: str, *says: str) -> Wrong:
    """As `setting`, but what the sentence says replaces the last argument."""
    return Wrong(MAIN + arguments, says, retry=STOP, instead=True)


def phases(value: str, *says: str, before: str = "") -> Wrong:
    """As `setting`, for a value of `phases`; braces stand for themselves."""
    escaped, *says = (text.replace("{", "{{").replace("}", "}}") for text in (value, *says))
    return setting(f'{before}--config.phases="{escaped}"', *says)


FIELDS = [
    setting("--config.data.image_size=8", "data.image_size is 8", '.image_size="(8, 8)"'),
    setting("--config.data.image_size='(8,)'", "data.image_size is (8,)", '="(8, 8)"'),
    setting("--config.data.image_size='(8, 8, 1)'", "(8, 8, 1)", '="(8, 8)"'),
    setting("--config.data.image_size='(8, -8)'", "(8, -8)", '.image_size="(8, 8)"'),
    setting("--config.data.image_size='(8.0, 8)'", "(8.0, 8)", '.image_size="(8, 8)"'),
    setting("--config.data.image_size=8x8", "'8x8'", '.image_size="(8, 8)"'),
    setting("--config.data.image_size=eight", "'eight'", ".image_size="),
    setting("--config.data.image_size=", "data.image_size is ''", ".image_size="),
    setting("--config.data.image_size='(9, 9)'", "data.image_size, (9, 9)", ".patch_size=1"),
    setting("--config.init.ignore=", "init.ignore is ''", "init.ignore="),
    setting("--config.init.ignore='(1, 2)'", "(1, 2)", "init.ignore="),
    setting("--config.init.ignore=\"('[',)\"", "init.ignore is ('[',)", "init.ignore="),
    setting("--config.init.reinit=\"('[',)\"", "init.reinit is ('[',)", "init.reinit="),
    setting("--config.init.map=mid_block=0", "init.map is 'mid_block=0'", "init.map="),
    setting("--config.init.map='in_block=0 out_block=x'", "out_block=x'", "init.map="),
    setting(
        "--config.init.map='in_block=0,1 out_block=0,1'",
        "init.map is 'in_block=0,1 out_block=0,1'",
        "init.map='in_block=0 out_block=0'",
    ),
    setting("--config.init.allow=diffusion.shedule", "shedule'", "\"('diffusion.schedule',)\""),
    setting("--config.init.allow=\"('seed',)\"", "('seed',)", "init.allow="),
    setting("--config.seed=1.5", "seed is 1.5", "--config.seed=2"),
    setting("--config.seed=True", "seed is True", "--config.seed="),
    setting("--config.seed=-1", "seed is -1", "--config.seed=0"),
    setting("--config.seed=99999999999", "seed is 99999999999", "--config.seed=2147483647"),
    setting("--config.seed=", "seed is ''", "--config.seed=0"),
    setting("--config.train.num_steps=many", "'many'", "--config.train.num_steps="),
    setting("--config.train.num_steps=1e3", "1000.0", "--config.train.num_steps=1000"),
    setting("--config.train.num_steps=0", "num_steps is 0", "--config.train.num_steps=1"),
    setting("--config.train.num_steps=-5", "num_steps is -5", "--config.train.num_steps=1"),
    setting("--config.train.num_steps=inf", "num_steps is inf", "--config.train.num_steps="),
    setting("--config.train.num_steps=None", "num_steps is None", "--config.train.num_steps="),
    setting("--config.train.batch_size=2.5", "batch_size is 2.5", "--config.train.batch_size=2"),
    Wrong(
        MAIN + "--config.train.dry_run=yes",
        ("'yes'", "--config.train.dry_run=True"),
        retry=" --config.data.name=cats",
        after="'cats'",
    ),
    setting("--config.train.dry_run=2", "dry_run is 2", "--config.train.dry_run="),
    setting("--config.data.fraction=2", "data.fraction is 2", "--config.data.fraction=1"),
    setting("--config.data.fraction=-0.1", "fraction is -0.1", "--config.data.fraction=0"),
    setting("--config.data.fraction=10%", "'10%'", "--config.data.fraction=1.0"),
    setting("--config.data.crop=centre", "'centre'", "--config.data.crop=center"),
    setting("--config.data.flip=maybe", "'maybe'", "--config.data.flip="),
    setting("--config.data.cache=hots", "'hots'", "--config.data.cache=host"),
    setting("--config.data.cache=7", "data.cache is '7'", "--config.data.cache=device"),
    setting("--config.data.channels=0", "data.channels is 0", "--config.data.channels=1"),
    setting("--config.model.size=b", "'b'", "--config.model.size=B"),
    setting("--config.model.width=-3", "model.width is -3", "--config.model.width=0"),
    setting("--config.model.width=33", "model.num_heads is 2", "--config.model.num_heads=1"),
    setting("--config.model.patch_size=3", "patch_size is 3", "--config.model.patch_size=2"),
    setting("--config.model.mlp_ratio=0", "mlp_ratio is 0", "--config.model.mlp_ratio=0.25"),
    setting("--config.model.dropout=nan", "dropout is nan", "--config.model.dropout=0.0"),
    setting("--config.model.attention=hoper", "'hoper'", "--config.model.attention=hopper"),
    setting("--config.model.dtype=float16", "'float16'", "--config.model.dtype="),
    setting("--config.mask.ratio=0.99", "mask.ratio is 0.99", "--config.mask.ratio=0.95"),
    setting("--config.mask.ratio=-1", "mask.ratio is -1", "--config.mask.ratio=0"),
    setting("--config.mask.ratio=half", "'half'", "--config.mask.ratio=0.5"),
    setting("--config.mask.ratio=nan", "mask.ratio is nan", "--config.mask.ratio=0.5"),
    setting("--config.mask.ratio='(0.5,)'", "(0.5,)", "--config.mask.ratio="),
    setting("--config.mask.kind=blok", "'blok'", "--config.mask.kind=block"),
    setting("--config.mask.kind=block --config.mask.block_size=3", "size is 3", "block_size=2"),
    setting("--config.mask.kind=crop --config.mask.crop_size=9", "size is 9", "crop_size=4"),
    setting("--config.mask.kind=block --config.mask.hidden=pol", "'pol'", "mask.hidden=pool"),
    setting("--config.mask.hidden=pool", "mask.hidden is 'pool'", "--config.mask.hidden=drop"),
    setting(
        "--config.mask.kind=block --config.mask.hidden=pool --config.mask.pool_size=3",
        "pool_size is 3",
        "pool_size=2",
    ),
    setting("--config.mask.pool_size=0", "pool_size is 0", "--config.mask.pool_size=1"),
    setting("--config.mask.pool_weight=-1", "pool_weight is -1", "--config.mask.pool_weight=0"),
    setting("--config.optim.lr_peak=-1", "lr_peak is -1", "--config.optim.lr_peak=0"),
    setting("--config.optim.lr_peak=inf", "lr_peak is inf", "--config.optim.lr_peak=0.002"),
    setting("--config.optim.lr_peak=1e400", "lr_peak is inf", "--config.optim.lr_peak=0.002"),
    setting("--config.optim.lr_peak=fast", "'fast'", "--config.optim.lr_peak=0.002"),
    setting("--config.optim.b1=1", "optim.b1 is 1", "--config.optim.b1=0.99999"),
    setting("--config.optim.ema_decay=2", "ema_decay is 2", "--config.optim.ema_decay=1"),
    setting("--config.optim.name=moun", "'moun'", "--config.optim.name=muon"),
    setting("--config.optim.lr_schedule=wds", "'wds'", "--config.optim.lr_schedule=wsd"),
    setting("--config.optim.lr_end=1.5", "lr_end is 1.5", "--config.optim.lr_end=1"),
    setting("--config.optim.lr_decay_share=-1", "lr_decay_share is -1", "lr_decay_share=0"),
    setting("--config.optim.decay_on=matrix", "'matrix'", "--config.optim.decay_on=matrices"),
    setting("--config.optim.accumulate_steps=3", "steps is 3", "accumulate_steps=1"),
    setting("--config.optim.ema_ramp=1.0", "ema_ramp is 1.0", "--config.optim.ema_ramp="),
    setting(
        "--config.sample.steps=9 --config.diffusion.num_timesteps=9",
        "num_timesteps is 9",
        "num_timesteps=50",
    ),
    setting("--config.diffusion.prediction=noise", "'noise'", "--config.diffusion.prediction="),
    setting("--config.diffusion.loss_weight=minsnr", "'minsnr'", "loss_weight=min_snr"),
    setting(
        "--config.diffusion.loss_weight=sigmoid --config.diffusion.loss=l1",
        "loss_weight is 'sigmoid'",
        "--config.diffusion.loss_weight=uniform",
    ),
    setting("--config.diffusion.min_snr_gamma=0", "gamma is 0", "min_snr_gamma=0.01"),
    setting("--config.diffusion.draw=lognormal", "'lognormal'", "draw=logit_normal"),
    setting("--config.diffusion.draw_std=-1", "draw_std is -1", "diffusion.draw_std=0"),
    setting("--config.diffusion.input_perturbation=-1", "perturbation is -1", "perturbation=0"),
    setting("--config.diffusion.framework=emd", "'emd'", "--config.diffusion.framework=edm"),
    setting(EDM + "--config.diffusion.schedule=linear", "'linear'", "framework=ddpm, or leave out"),
    setting(EDM + "--config.diffusion.prediction=v", "prediction is 'v'", "framework=ddpm"),
    setting(EDM + "--config.diffusion.draw=logit_normal", "is 'logit_normal'", "framework=ddpm"),
    setting("--config.diffusion.edm_mean=0", "edm_mean is 0", "--config.diffusion.framework=edm"),
    setting("--config.diffusion.sigma_max=9", "sigma_max is 9", "framework=edm, or leave out"),
    setting(EDM + "--config.diffusion.sigma_max=0.001", "max is 0.001", "sigma_max=80.0"),
    setting(EDM + "--config.diffusion.sigma_min=90", "sigma_max is 80.0", "sigma_max=180.0"),
    setting(EDM + "--config.diffusion.sigma_data=0", "sigma_data is 0", "sigma_data=0.01"),
    setting(EDM + "--config.diffusion.rho=0.5", "rho is 0.5", "--config.diffusion.rho=1"),
    setting(EDM + "--config.diffusion.edm_std=-1", "edm_std is -1", "diffusion.edm_std=0"),
    setting("--config.model.wavelet=harr", "'harr'", "--config.model.wavelet=haar"),
    setting("--config.model.coarse='(2, 1.0)'", "(2, 1.0)", '--config.model.coarse="((2, 1.0),)"'),
    setting("--config.model.coarse='((3, 1.0),)'", "((3, 1.0),)", '--config.model.coarse="()"'),
    setting(
        "--config.model.coarse='((2, 1.0),)' --config.diffusion.coarse_every=3",
        "coarse_every is 3",
        "--config.diffusion.coarse_every=2",
    ),
    setting(
        "--config.model.wavelet=haar --config.data.image_size='(9, 9)' --config.model.patch_size=3",
        "(9, 9)",
        "--config.model.wavelet=none",
    ),
    setting(
        "--config.model.wavelet=haar --config.model.patch_size=1",
        "patch_size is 1",
        "--config.model.patch_size=2",
    ),
    setting("--config.sample.guidance_scale=nan", "guidance_scale is nan", "guidance_scale=1"),
    setting(
        "--config.model.num_classes=0 --config.sample.guidance_scale=2",
        "guidance_scale is 2",
        "guidance_scale=1",
    ),
    setting(
        "--config=configs/phases_digits.py --config.train.num_steps=40 --config.diffusion.loss=l1 "
        "--config.diffusion.loss_weight=min_snr",
        "error: diffusion.loss_weight is 'min_snr'",
        "--config.diffusion.loss_weight=uniform",
    ),
    setting(
        "--config.model.class_dropout=0 --config.sample.guidance_scale=2",
        "(model.class_dropout is 0)",
        "guidance_scale=1",
    ),
    setting(
        "--config.model.num_classes=0 --config.sample.label=3",
        "sample.label is 3",
        "--config.sample.label=-1",
    ),
    setting("--config.model.num_classes=10 --config.sample.label=10", "label is 10", "label="),
    setting("--config.sample.steps=2000", "steps is 2000", "--config.sample.steps=1000"),
    setting("--config.sample.eta=1.5", "eta is 1.5", "--config.sample.eta=1"),
    setting("--config.sample.num=0", "sample.num is 0", "--config.sample.num=1"),
    setting("--config.sample.sampler=dpm_slover", "'dpm_slover'", "sampler=dpm_solver"),
    setting("--config.sample.sampler=DDIM", "'DDIM'", "--config.sample.sampler=ddim"),
    setting("--config.sample.spacing=logsnr", "'logsnr'", "sample.spacing=log_snr"),
    setting("--config.sample.threshold=99.5", "threshold is 99.5", "sample.threshold=1"),
    setting("--config.sample.recompute_eps=maybe", "'maybe'", "sample.recompute_eps=False"),
    setting("--config.sample.guidance_interval=0.5", "is 0.5", '_interval="(0.0, 1.0)"'),
    setting("--config.sample.guidance_interval='(0.8, 0.2)'", "(0.8, 0.2)", '="(0.2, 0.8)"'),
    setting("--config.sample.guidance_interval='(-1, 2)'", "(-1, 2)", '="(0.0, 1.0)"'),
    setting("--config.sample.strength=2", "sample.strength is 2", "sample.strength=1"),
    setting("--config.mesh.fsdp=3", "mesh.fsdp is 3", "--config.mesh.fsdp=1"),
    setting("--config.mesh.data=7", "mesh.data is 7", "--config.mesh.data=-1"),
    setting("--config.mesh.data=0", "mesh.data is 0", "--config.mesh.data="),
    setting("--config.log.wandb=of", "'of'", "--config.log.wandb=off"),
    setting("--config.log.wandb=True", "wandb is 'True'", "--config.log.wandb=off"),
    setting("--config.log.wandb_project=a/b", "'a/b'", "--config.log.wandb_project=a-b"),
    setting("--config.log.wandb_project=", "wandb_project is ''", "wandb_project=maskdm_jax"),
    Wrong(
        MAIN + "--config.log.wandb=offline",
        ("'offline'", "pip install '.[wandb]'", "--config.log.wandb=off"),
        retry=STOP,
        env=(("PYTHONPATH", "{tmp}/no_wandb"),),
    ),
    unknown("--config.mask.ration=0.5", "mask.ration", "--config.mask.ratio"),
    unknown("--config.masks.ratio=0.5", "masks.ratio", "--config.mask.ratio"),
    unknown("--config.lr_peak=1", "lr_peak", "--config.optim.lr_peak"),
    Wrong(MAIN + "--config.zzz=1", ("zzz", "--help")),
    Wrong(MAIN + "--config.mask=0.5", ("--config.mask ", "--config.mask.")),
    Wrong(MAIN + "--config.seed.x=1", ("seed.x", "--config.seed=")),
    unknown("--config.mask.ratio", "--config.mask.ratio", "--config.mask.ratio=0.5"),
]

NINE = "--config.train.num_steps=9 "
PHASES = [
    phases("block", "phases is 'block'", '--config.phases="()"'),
    phases("(1, {'mask.ratio': 0.5})", "(1, {", "((1, {'mask.ratio': 0.5}),)"),
    phases("((1, {}), (0, {}))", "(0, {})", "((1, {}), (1.0, {}))", before=NINE),
    phases("((1, {}), (-2, {}))", "(-2, {})", "((1, {}), (1.0, {}))", before=NINE),
    phases("((1, {}), (1e999, {}))", "(inf, {})", '--config.phases="()"'),
    phases("((1, {}), {})", "((1, {}), {})", '--config.phases="()"'),
    phases("((1, {1: 2}),)", "{1: 2}", '--config.phases="()"'),
    phases("((1, {'mask.rato': 0.5}),)", "phase 1 of phases sets mask.rato", "{'mask.ratio': 0.5}"),
    phases("((1, {'lr_peak': 0.5}),)", "lr_peak, which is not", "{'optim.lr_peak': 0.5}"),
    phases("((1, {'zzz': 0.5}),)", "zzz, which is not a field", "((1, {}),)"),
    phases("((1, {'data.flip': True}),)", "data.flip, which no phase can", "((1, {}),)"),
    phases("((1, {'optim.ema': 'power'}),)", "optim.ema, which no phase can", "((1, {}),)"),
    phases("((1, {'mask.kind': 'blok'}),)", "is 'blok'", "{'mask.kind': 'block'}"),
    phases("((1, {'mask.ratio': 2}),)", "mask.ratio is 2", "{'mask.ratio': 0.95}"),
    phases(
        "((1, {'mask.kind': 'block', 'mask.block_size': 3}),)",
        "phase 1 of phases: mask.block_size is 3",
        "'mask.block_size': 2}",
    ),
    phases("((1, {'model.patch_size': 3}),)", "size is 3", "{'model.patch_size': 2}"),
    phases("((1, {'optim.accumulate_steps': 3}),)", "steps is 3", "'optim.accumulate_steps': 1}"),
    phases("((1, {}), (1, {}))", "gets none of the 1 updates", "--config.train.num_steps=3"),
    phases(
        "((1, {'model.patch_size': 4}), (1, {'model.patch_size': 6}))",
        "phase 2 of phases: model.patch_size is 6 after 4",
        "(1, {'model.patch_size': 4}))",
        before=f"{NINE}--config.data.image_size='(12, 12)' ",
    ),
    phases(
        "((1, {'model.patch_size': 4}), (1, {'model.patch_size': 2}))",
        "phase 2 of phases: model.patch_size is 2 after 4",
        "(1, {'model.patch_size': 4}))",
        before=f"{NINE}--config.model.wavelet=haar ",
    ),
    phases(
        "((1, {'model.patch_size': 2}), (1, {'model.patch_size': 1}))",
        "phase 2 of phases: model.patch_size is 1 after 2",
        "(1, {'model.patch_size': 2}))",
        before=f"{NINE}--config.model.coarse='((2, 1.0),)' ",
    ),
    phases(
        "((1, {'diffusion.draw': 'uniform', 'mask.ratio': 0.5}), (1, {'diffusion.draw_std': 1}))",
        "diffusion.draw, which diffusion.framework=edm does not use",
        "((1, {'mask.ratio': 0.5}), (1, {}))",
        before=f"{NINE}{EDM}",
    ),
    Wrong(
        MAIN + "--config.mask.ratio=0.25 --config.phases=\"((1, {{'mask.ratio': 0.5}}),)\"",
        ("mask.ratio is 0.25, but each", "{{'mask.ratio': 0.25}}"),
    ),
    setting("--config.phases_by=flop", "'flop'", "--config.phases_by=flops"),
    setting("--config.optim.ema_at_phase=carrry", "'carrry'", "ema_at_phase=carry"),
    setting("--config.optim.moments_at_phase=kept", "'kept'", "moments_at_phase=keep"),
]

FLAGS = [
    setting("--mode=smaple", "--mode is 'smaple'", "--mode=sample"),
    unknown("--mode=dance", "--mode is 'dance'", "--mode=train"),
    setting("--mode=", "--mode is ''", "--mode=train"),
    unknown("--mode", "--mode", "--mode=train"),
    unknown("--mask.ratio=0.5", "--mask.ratio", "--config.mask.ratio=0.5"),
    unknown("--wokdir=x", "--wokdir", "--workdir"),
    Wrong(
        MAIN + "--zzz=3",
        (
            "--zzz",
            "--help",
        ),
    ),
    Wrong(
        MAIN + "-v",
        (
            "-v",
            "--help",
        ),
    ),
    Wrong(
        MAIN + "extra",
        (
            "'extra'",
            "--flag=value",
        ),
    ),
    Wrong(
        MAIN + "--num_processes=two",
        (
            "'two'",
            "--num_processes=",
        ),
    ),
    Wrong(
        MAIN + "--num_processes=1.5",
        (
            "1.5",
            "--num_processes=",
        ),
    ),
    Wrong(
        MAIN + "--num_processes=2",
        (
            "--coordinator",
            "--process_id",
            "--coordinator=HOST:PORT",
        ),
    ),
    Wrong(
        MAIN + "--num_processes=0 --process_id=0 --coordinator=a:1",
        (
            "is 0",
            "--num_processes=",
        ),
    ),
    Wrong(
        MAIN + "--num_processes=2 --process_id=2 --coordinator=a:1",
        (
            "is 2",
            "--process_id=",
        ),
    ),
    Wrong(
        MAIN + "--num_processes=2 --process_id=0 --coordinator=a",
        (
            "'a'",
            "--coordinator=",
        ),
    ),
    Wrong(
        MAIN + "--num_processes=2 --process_id=0 --coordinator=a:0",
        (
            "a:0",
            "--coordinator=",
        ),
    ),
    Wrong(
        MAIN + "--num_processes=2 --process_id=0 --coordinator=a:99999",
        (
            "a:99999",
            "--coordinator=",
        ),
    ),
    Wrong("main.py", ("--config", "main.py --config=configs/pretrain_digits.py --workdir=")),
    Wrong("main.py --config=configs/pretrain_digits.py", ("--workdir", "--workdir=")),
    Wrong("main.py --workdir={tmp}/w", ("--config", "--config=configs/")),
    Wrong("maskdm_jax", ("missing", "one of train, sample", "type maskdm --help")),
    Wrong("maskdm_jax trian --workdir=w", ("'trian'", "one of train, ", "type maskdm train")),
    Wrong("maskdm_jax sample", ("--config is missing", "maskdm sample --config=pretrain_digits")),
    Wrong("maskdm_jax sample --mode=train", ("--mode", "type --help")),
    Wrong("maskdm_jax digest", ("workdir is missing", "type")),
    Wrong(MAIN + "--workdir=", ("--workdir", "type")),
    Wrong(MAIN + "--workdir={tmp}/a_file", ("{tmp}/a_file", "type", "--workdir")),
    Wrong(MAIN + "--workdir={tmp}/a_file/w", ("{tmp}/a_file/w", "type", "--workdir")),
    Wrong(MAIN + "--workdir=/proc/w", ("/proc/w", "type", "--workdir")),
    Wrong(MAIN + "--workdir=s3://bucket/w", ("s3://bucket/w", "type", "/mnt/share")),
    Wrong(MAIN + "--workdir={tmp}/w[1]", ("w[1]", "type", "--workdir")),
    Wrong(MAIN + "--workdir='{tmp}/a_file/a\nb'", ("a\\nb", "type", "--workdir")),
    Wrong(MAIN + "--workdir='{tmp}/a\x1b[1mb'", ("a\\x1b", "type", "--workdir")),
    Wrong(MAIN + "--workdir={tmp}/" + "w" * 256, ("www", "type", "--workdir")),
]

CONFIGS = [
    Wrong(f"main.py {STOP} --config={name}", (name, *says))
    for name, *says in [
        ("configs/nope.py", "type", "--config=configs/"),
        ("configs/pretrain_digit.py", "--config=configs/pretrain_digits.py"),
        ("pretrain_digit", "finetune_celeba64, ", "--config=configs/pretrain_digits.py"),
        ("configs", "a folder", "--config=configs/"),
        ("configs/pretrain_digits", "--config=configs/pretrain_digits.py"),
        ("{tmp}/a.json", "type", "--config=configs/"),
        ("{tmp}/syntax.py", "line 3", "type"),
        ("{tmp}/no_module.py", "nowhere", "line 1", "type"),
        ("{tmp}/raises.py", "ZeroDivisionError", "line 4", "type"),
        ("{tmp}/stops.py", "type"),
        ("{tmp}/no_function.py", "get_config", "type"),
        ("{tmp}/returns_none.py", "None", "default_config", "type"),
        ("{tmp}/returns_dict.py", "dict", "default_config", "type"),
        ("{tmp}/other_fields.py", "default_config", "type"),
        ("{tmp}/unknown_field.py", "ration", "ratio", "type"),
        ("{tmp}/wrong_type.py", "line 6", "type"),
        ("{tmp}/needs_argument.py", "get_config", "type"),
        ("configs/pretrain_digits.py:paper", "takes none", "--config=configs/pretrain_digits.py"),
        (
            "configs/pretrain_celebahq.py:papr",
            "'papr'",
            "one of ours, paper",
            "--config=configs/pretrain_celebahq.py:paper",
        ),
        (
            "configs/ablation_celeba64.py:blok4",
            "'blok4'",
            "block8,0.9, crop,0.1",
            "--config=configs/ablation_celeba64.py:block4,0.",
        ),
        ("cifar10:finetun", "one of pretrain, finetune", "--config=cifar10:finetune"),
        ("{tmp}/variants.py:papr", "one of ours, paper", "--config={tmp}/variants.py:paper"),
        ("{tmp}/variants.py:", "one of ours, paper", "--config={tmp}/variants.py:ours"),
        ("{tmp}/variant.py:paper", "not there", "type"),
        ("", "--config", "type"),
    ]
]
CONFIGS += [
    Wrong(f"main.py --config={{tmp}}/wrong_value.py {STOP}", (
        "mask.ratio is 3", "--config.mask.ratio=0.95"), retry=""),
]  # fmt: skip

SETS = [
    Wrong(MAIN + "--config.data.name=", ("data.name", "--config.data.name=digits")),
    Wrong(MAIN + "--config.data.name=cats", ("'cats'", "prepare --images FOLDER --name cats")),
    Wrong(MAIN + "--config.data.name=digit", ("'digit'", "--config.data.name=digits")),
    Wrong(MAIN + "--config.data.name=My-Faces", ("'My-Faces'", "--name my_faces")),
    Wrong(MAIN + "--config.data.name=celeb_a", ("'celeb_a'", "tfds build celeb_a --file_format")),
    Wrong(MAIN + "--config.data.name=cifar10/3.0.2", ("cifar10/3.0.2", "tfds build cifar10")),
    Wrong(MAIN + "--config.data.name='a b'", ("'a b'", "--name a_b")),
    Wrong(MAIN + "--config.data.name=../x", ("'../x'", "--config.data.name=")),
    Wrong(MAIN + "--config.data.name=a.zip", ("{tmp}/data/a.zip", "--config.data.name=")),
    Wrong(
        MAIN + "--config.data.name=gs://b/x/a.zip",
        ("gs://b/x/a.zip", "--config.data.dir=gs://b/x --config.data.name=a.zip"),
    ),
    Wrong(MAIN + "--config.data.name={tmp}/empty.zip", ("{tmp}/empty.zip", "data.name=FILE.zip")),
    Wrong(MAIN + "--config.data.name={tmp}/cut.zip", ("{tmp}/cut.zip", "type the same command")),
    Wrong(MAIN + "--config.data.name={tmp}/text.zip", ("a.jpg of {tmp}/text.zip", "repair or")),
    Wrong(MAIN + "--config.data.name={tmp}/a_lmdb", ("a_lmdb", "type")),
    Wrong(
        MAIN + "--config.data.name={tmp}/pixel.zip",
        ("(1, 1, 1)", "--config.data.crop=center"),
        retry=" --config.model.num_classes=0 --config.model.patch_size=1 "
        "--config.init.path=/nowhere --workdir={tmp}/x",
        after="/nowhere",
    ),
    Wrong(
        MAIN + "--config.data.fraction=0.0001",
        ("0.0001", "none of the 1,797", "--config.data.fraction=0.00056"),
        retry=" --config.init.path=/nowhere --workdir={tmp}/x",
        after="/nowhere",
    ),
    Wrong(
        MAIN + "--config.data.crop=celeba",
        ("celeba", "(8, 8)", "--config.data.crop=center"),
        retry=" --config.init.path=/nowhere --workdir={tmp}/x",
        after="/nowhere",
    ),
    Wrong(MAIN + "--config.data.split=tset", ("'tset'", "--config.data.split=train")),
    Wrong(MAIN + "--config.data.split=train[:5]", ("train[:5]", "--config.data.split=train")),
    Wrong(MAIN + "--config.data.dir={tmp}/a_file", ("{tmp}/a_file", "--config.data.dir=")),
    Wrong(MAIN + "--config.data.dir=/proc/x", ("/proc/x", "type")),
    Wrong(MAIN + "--config.data.dir=gs://bucket/x", ("gs://bucket/x", "type")),
    Wrong(
        MAIN + "--config.data.name=cats --config.data.dir={tmp}/nowhere",
        ("{tmp}/nowhere", "--config.data.dir="),
    ),
    Wrong(
        MAIN + "--config.data.image_size='(16, 16)'",
        ("(16, 16, 1)", '--config.data.image_size="(8, 8)"'),
        retry=" --config.train.num_steps=1 --config.init.path=/nowhere --workdir={tmp}/x",
        after="/nowhere",
    ),
    Wrong(
        MAIN + "--config.data.channels=3",
        ("(8, 8, 3)", "--config.data.channels=1"),
        retry=" --config.init.path=/nowhere --workdir={tmp}/x",
        after="/nowhere",
    ),
    Wrong(
        MAIN + "--config.model.num_classes=9",
        ("num_classes is 9", "--config.model.num_classes=10"),
        retry=" --config.init.path=/nowhere --workdir={tmp}/x",
        after="/nowhere",
    ),
    Wrong(
        MAIN + "--config.data.name=swiss_roll --config.data.image_size='(1, 2)' "
        "--config.model.patch_size=1",
        ("num_classes is 10", "no label that is one class", "--config.model.num_classes=0"),
        retry=" --config.init.path=/nowhere --workdir={tmp}/x",
        after="/nowhere",
    ),
]

WEIGHTS = [
    *(
        Wrong(f"{TUNE}--config.init.path={path}", (path, *says))
        for path, *says in [
            ("/nowhere", "does not exist", "--config.init.path="),
            ("{tmp}/text.pt", "type", "--config.init.path="),
            ("{tmp}/empty.pt", "empty", "--config.init.path="),
            ("{tmp}/truncated.pt", "type", "--config.init.path="),
            ("{tmp}/code.pt", "type", "--config.init.path="),
            ("{tmp}/code_in_zip.pt", "type"),
            ("{tmp}/zip.pt", "type", "--config.init.path="),
            ("{tmp}/other_uvit.pt", "final_layer.weight [3, 3, 3, 3], a 3x3 convolution", "type"),
            ("{tmp}/truncated_official.pt", "cut short", "--config.init.path="),
            ("{tmp}/model.safetensors", "safetensors", "--config.init.path="),
            ("{tmp}/a.png", "type", "--config.init.path="),
            ("{tmp}/an_empty_folder", "no checkpoint", "--config.init.path="),
            ("{tmp}/run/checkpoints", "--config.init.path={tmp}/run"),
            ("{tmp}/run/checkpoints/1", "--config.init.path={tmp}/run"),
            ("{tmp}/nan", "patch_embed/kernel", "not finite", "--config.init.path="),
            ("s3://bucket/w", "type"),
        ]
    ),
    Wrong(TUNE + "--config.init.path={tmp}/run --config.model.width=64", (
        "model.width (32 there, 64 here)", "--config.model.width=32"),
        retry="", after=""),
    Wrong(TUNE + "--config.init.path={tmp}/run --config.model.depth=5", (
        "model.depth (3 there, 5 here)", "--config.model.depth=3",
        "--config.init.map='in_block=0,0 out_block=0,0'")),
    Wrong(TUNE + "--config.init.path={tmp}/run --config.model.depth=5 "
          "--config.init.ignore='.*_block_1/.*'", ("model.depth (3", "--config.init.map='in_b")),
    Wrong(TUNE + "--config.init.map='in_block=0 out_block=0'", (
        "init.map is 'in_block=0 out_block=0', but init.path is empty", "--config.init.map=''")),
    Wrong(TUNE + "--config.init.reinit=position", (
        "init.reinit is ('position',), but init.path is empty", "--config.init.reinit=")),
    Wrong(TUNE + "--config.init.path={tmp}/run --config.model.mlp_ratio=2", (
        "model.mlp_ratio (4.0 there, 2.0 here)", "--config.model.mlp_ratio=4",
        "--config.init.reinit=\"('.*/mlp_in/bias', '.*/mlp_in/kernel', '.*/mlp_out/kernel',)\"")),
    Wrong(TUNE + "--config.init.path={tmp}/official.pt --config.model.qkv_bias=True", (
        "model.qkv_bias (False there, True here)", "--config.model.qkv_bias=False",
        "--config.init.reinit=\"('.*/q_bias', '.*/v_bias',)\"")),
    Wrong(TUNE + "--config.init.path={tmp}/official.pt --config.diffusion.schedule=linear", (
        "diffusion.schedule (cosine there, linear here)", "--config.diffusion.schedule=cosine")),
    Wrong(TUNE + "--config.init.path={tmp}/run --config.init.map='in_block=4 out_block=0'", (
        "has no in_block_4", "--config.init.map='in_block=0 out_block=0'")),
    Wrong(TUNE + "--config.init.path={tmp}/run --config.init.reinit=positon", (
        "'positon' matches no parameter", "--config.init.reinit=\"('position',)\"")),
    Wrong(TUNE + "--config.init.path={tmp}/run --config.diffusion.prediction=v", (
        "diffusion.prediction (eps there, v here)", "--config.diffusion.prediction=eps")),
    Wrong(TUNE + EDM + "--config.init.path={tmp}/run", (
        "diffusion.framework (ddpm there, edm here)", "--config.diffusion.framework=ddpm to keep",
        "init.allow=\"('diffusion.framework',)")),
    Wrong(TUNE + "--config.model.wavelet=haar --config.init.path={tmp}/run", (
        "model.wavelet (none there, haar here)", "--config.model.wavelet=none to keep")),
    Wrong(POOL + "--config.init.path={tmp}/run", (
        "mask.hidden (drop there, pool here)", "--config.mask.hidden=drop", "'pooled/.*'")),
    Wrong(TUNE + "--config.init.path={tmp}/run --config.init.weights=em", (
        "'em'", "--config.init.weights=ema")),
]  # fmt: skip

FILE = SAMPLE.replace("{tmp}/run", "{tmp}/w")
EXPORT = "maskdm_jax.weights.torch_io export {tmp}/run "
RUNS = [
    Wrong(FILE + "--config.init.path={tmp}/run", ("{tmp}/w", "--workdir={tmp}/run")),
    Wrong(FILE + "--config.init.path=/no/file.pt", (
        "init.path /no/file.pt does not exist", "{tmp}/w holds no", "--config.init.path=PATH")),
    Wrong(FILE + "--config.init.path={tmp}/code_in_zip.pt", ("could run any code", "type")),
    Wrong(FILE + "--config.init.path={tmp}/truncated_official.pt", ("cut short", "type")),
    Wrong(FILE + "--config.init.path={tmp}/other_uvit.pt", ("3x3 convolution", "type")),
    Wrong(FILE + "--config.init.path={tmp}/official.pt --config.model.width=64", (
        "(32 there, 64 here)", "--config.model.width=32")),
    Wrong(FILE + "--config.init.path={tmp}/official.pt --config.model.num_classes=9", (
        "(10 there, 9 here)", "--config.model.num_classes=10")),
    Wrong(FILE + "--config.init.path={tmp}/official.pt --config.sample.label=10", (
        "sample.label is 10", "--config.sample.label=-1")),
    Wrong(FILE + "--config.init.path={tmp}/official.pt --config.diffusion.schedule=linear", (
        "(cosine there, linear here)", "--config.diffusion.schedule=cosine")),
    Wrong(FILE.replace("=sample ", "=evaluate ") + "--config.init.path={tmp}/other_uvit.pt", (
        "3x3 convolution", "type")),
    Wrong("maskdm_jax.weights.torch_io", ("workdir is missing", "export WORKDIR --out=FILE.pt")),
    Wrong("maskdm_jax.weights.torch_io exprot {tmp}/run", ("'exprot'", "export")),
    Wrong("maskdm_jax.weights.torch_io export {tmp}/an_empty_folder --out={tmp}/o", (
        "an_empty_folder", "type")),
    Wrong(EXPORT, ("--out is missing", "--out=FILE.pt")),
    Wrong(EXPORT + "--out={tmp}/an_empty_folder", ("{tmp}/an_empty_folder is a folder", "--out=")),
    Wrong(EXPORT + "--out=/nowhere/o.pt", ("/nowhere/o.pt", "--out=")),
    Wrong(EXPORT + "--out={tmp}/o --step=9", ("[1], not 9", "--step=1")),
    Wrong(EXPORT + "--out={tmp}/o --weights=em", ("'em'", "--weights=ema")),
    Wrong(EXPORT + "--out={tmp}/o --loss_weight=maybe", ("'maybe'", "--loss_weight=")),
    Wrong(EXPORT + "--otu={tmp}/o", ("--otu", "--out")),
    Wrong(SAMPLE + "--workdir={tmp}/w", ("{tmp}/w", "no checkpoint", "command that trains first")),
    Wrong(SAMPLE + "--workdir={tmp}/a_file", ("{tmp}/a_file", "type")),
    Wrong(SAMPLE + "--config.model.width=64", ("(32 there, 64 here)", "--config.model.width=32")),
    Wrong(SAMPLE + EDM, ("framework (ddpm there, edm here)", "--config.diffusion.framework=ddpm")),
    Wrong(SAMPLE + "--config.sample.label=10", ("sample.label is 10", "--config.sample.label=-1")),
    Wrong(SAMPLE + "--config.sample.guidance_scale=x", ("scale is 'x'", "guidance_scale=1")),
    Wrong(SAMPLE + "--config.sample.steps=1001", ("sample.steps is 1001", "sample.steps=1000")),
    Wrong(SAMPLE + "--config.sample.init_mask={tmp}/8x8.png", (
        "sample.init_mask is '{tmp}/8x8.png'", "init_image is empty", "sample.init_image=FILE")),
    Wrong(SAMPLE + "--config.sample.strength=0.5", (
        "sample.strength is 0.5", "sample.init_image=FILE", "sample.strength=1.0")),
    Wrong(SAMPLE + "--config.sample.init_image=/nowhere", ("is /nowhere", "init_image=FILE")),
    Wrong(SAMPLE + "--config.sample.init_image={tmp}/a_file", ("{tmp}/a_file", "no picture")),
    Wrong(SAMPLE + "--config.sample.init_image=gs://b/a.png", ("gs://b/a.png", "type")),
    Wrong(SAMPLE + "--config.sample.init_image={tmp}/images/0.png", (
        "images/0.png, of 1x1 pixels", "expected 8x8", "init_image=FILE")),
    Wrong(SAMPLE + "--config.sample.init_image={tmp}/8x8.png "
        "--config.sample.init_mask={tmp}/images/0.png", (
        "init_mask is {tmp}/images/0.png, of 1x1 pixels", "expected 8x8", "init_mask=FILE")),
    Wrong(SAMPLE + "--workdir={tmp}/nan", ("patch_embed/kernel", "not finite", "type")),
    Wrong(POOL.replace("{tmp}/w", "{tmp}/run"), (
        "mask.hidden (drop there, pool here)", "--config.mask.hidden=drop")),
    Wrong(TUNE.replace("{tmp}/w", "{tmp}/run"), ("mask.kind is 'none'", "init.path={tmp}/run")),
    Wrong(MAIN.replace("{tmp}/w", "{tmp}/run") + "--config.model.width=64", (
        "(32 there, 64 here)", "--config.model.width=32")),
    Wrong("maskdm_jax.checkpoint", ("workdir", "digest WORKDIR")),
    Wrong("maskdm_jax.checkpoint digets {tmp}/run", ("'digets'", "digest")),
    Wrong("maskdm_jax.checkpoint digest", ("workdir", "type")),
    Wrong("maskdm_jax.checkpoint digest /nowhere", ("/nowhere", "type")),
    Wrong("maskdm_jax.checkpoint digest {tmp}/a_file", ("{tmp}/a_file", "type")),
    Wrong("maskdm_jax.checkpoint digest {tmp}/an_empty_folder", ("an_empty_folder", "type")),
    Wrong("maskdm_jax.checkpoint digest {tmp}/run --step=9", ("[1], not 9", "--step=1")),
    Wrong("maskdm_jax.checkpoint digest {tmp}/run --step=x", ("'x'", "--step=")),
    Wrong("maskdm_jax.checkpoint digest {tmp}/run --stp=1", ("--stp", "--step")),
    Wrong("maskdm_jax.checkpoint digest {tmp}/broken", ("{tmp}/broken", "type"), lines=1),
    Wrong("maskdm_jax.checkpoint digest {tmp}/broken --step=1", ("is damaged", "type"), lines=1),
    Wrong("maskdm_jax.report", ("workdirs", "W1 W2 --out=report.html")),
    Wrong("maskdm_jax.report {tmp}/run", ("--out", "--out=report.html")),
    Wrong("maskdm_jax.report /nowhere --out={tmp}/o", ("/nowhere", "type")),
    Wrong("maskdm_jax.report s3://bucket/run --out={tmp}/o", ("s3://bucket/run", "type")),
    Wrong("maskdm_jax.report {tmp}/run {tmp}/an_empty_folder --out={tmp}/o", (
        "{tmp}/an_empty_folder", "config.json", "type")),
    Wrong("maskdm_jax.report {tmp}/sampled --out={tmp}/o", ("settings.json", "type")),
    Wrong("maskdm_jax.report --otu=a {tmp}/run", ("--otu", "--out")),
    Wrong("maskdm_jax.report {tmp}/run --out={tmp}/an_empty_folder", (
        "{tmp}/an_empty_folder", "--out={tmp}/an_empty_folder/report.html")),
    Wrong("maskdm_jax.report {tmp}/run --out={tmp}/a_file/o", ("{tmp}/a_file", "--out=")),
]  # fmt: skip

DEVICES = [
    Wrong(MAIN, ("JAX_PLATFORMS is 'cuda'", "JAX_PLATFORMS=cpu"), env=(("JAX_PLATFORMS", "cuda"),)),
    Wrong(MAIN, ("JAX_PLATFORMS is 'gpu'", "type"), env=(("JAX_PLATFORMS", "gpu"),)),
    Wrong(SAMPLE, ("JAX_PLATFORMS is 'cuda'", "type"), env=(("JAX_PLATFORMS", "cuda"),)),
    Wrong("benchmarks.train_step --bench masked64 --data_dir={tmp}/data", (
        "JAX_PLATFORMS is 'cuda'", "type"), env=(("JAX_PLATFORMS", "cuda"),)),
]  # fmt: skip

LAUNCH = [
    Wrong(COMPILE, ("--topology", "--topology=v5e")),
    Wrong(COMPILE + "--topology=v9:4x4", ("'v9:4x4'", "--topology=v5e:4x4")),
    Wrong(COMPILE + "--topology=v5e:3x3", ("'v5e:3x3'", "--topology=v5e:4x4")),
    Wrong(COMPILE + "--topology=v5e-17", ("'v5e-17'", "--topology=v5e-16")),
    Wrong(COMPILE + "--topology=", ("--topology", "--topology=v5e")),
    Wrong(COMPILE + "--topolgy=v5e-16", ("--topolgy", "--topology")),
    Wrong(COMPILE + "--topology=v5e-16 --num_examples=0", ("0", "--num_examples=1")),
    Wrong(COMPILE + "--topology=v5e-16 --num_examples=x", ("'x'", "--num_examples=")),
    Wrong(COMPILE + "--topology=v5e-16 --mode=smaple", ("'smaple'", "--mode=sample")),
    Wrong(COMPILE + "--topology=v5e-16 --config.train.batch_size=3", ("is 3", "batch_size=16")),
    Wrong("launch/gpu_host.sh", ("--workdir", "--workdir=")),
    Wrong("launch/gpu_host.sh --wokdir=x", ("--wokdir=x", "--help")),
    Wrong("launch/gpu_host.sh --workdir={tmp}/w", ("--pretrain", "type --pretrain=configs/")),
    Wrong("launch/gpu_host.sh --workdir={tmp}/w --pretrain=configs/nope.py", (
        "configs/nope.py", "type --pretrain=configs/")),
    Wrong("launch/gpu_host.sh --pretrain pretrain_digits --finetune finetune_digits --workdir w", (
        "PYTHON is '/nowhere'", "type PYTHON="), env=(("PYTHON", "/nowhere"),)),
    Wrong("launch/demo.sh --out=x", ("--out=x", "type launch/demo.sh")),
    Wrong("launch/demo.sh a b", ("b", "type launch/demo.sh")),
    Wrong("launch/keep_running.sh", ("type launch/keep_running.sh",)),
    Wrong("launch/keep_running.sh --restarts=x true", ("x", "type launch/keep_running.sh")),
    Wrong("launch/keep_running.sh --restart=3 true", ("--restart=3", "--restarts=")),
    Wrong("launch/slurm.sbatch", ("type sbatch",)),
    Wrong("launch/tpu_pod.sh", ("create", "type launch/tpu_pod.sh")),
    Wrong("launch/tpu_pod.sh destroy", ("'destroy'", "type launch/tpu_pod.sh")),
    Wrong("launch/tpu_pod.sh create --name=a", ("--zone", "--zone=")),
    Wrong("launch/tpu_pod.sh create --name=a --zone=b", ("--type", "--type=v5litepod-16")),
    Wrong("launch/tpu_pod.sh create --name=a --zone=b --type=h100", ("'h100'", "--type=v5")),
    Wrong("launch/tpu_pod.sh install --name=a --zone=b --nfs=x", ("'x'", "--nfs=10")),
    Wrong("launch/tpu_pod.sh start --name=a --zone=b", ("type", "--config=configs/")),
    Wrong("launch/tpu_pod.sh logs --nam=a --zone=b", ("--nam=a", "--help")),
]  # fmt: skip

BENCHMARKS = [
    Wrong("benchmarks.train_step", ("--bench", "--bench=")),
    Wrong("benchmarks.train_step --bench=masked25", ("'masked25'", "--bench=masked256")),
    Wrong("benchmarks.train_step --bench=masked64 --batch=0", ("0", "--batch=1")),
    Wrong("benchmarks.train_step --bench=masked64 --seconds=nan", ("nan", "--seconds=")),
    Wrong("benchmarks.train_step --bench=masked64 --seconds=-1", ("-1", "--seconds=")),
    Wrong("benchmarks.train_step --bench=masked64 --data_dir=/nowhere", (
        "/nowhere", "prepare", "--data_dir")),
    Wrong("benchmarks.train_step --bench=masked64 --config.model.remat", (
        "--config.model.remat", "model.remat=none")),
    Wrong("benchmarks.train_step --bench=masked64 --config.model.reamt=blocks", (
        "model.reamt", "model.remat=blocks")),
    Wrong("benchmarks.train_step --bench=masked64 --config.model.remat=block", (
        "'block'", "model.remat=blocks")),
    Wrong("benchmarks.train_step --bench=masked64 --profle", ("--profle", "--profile")),
    Wrong("benchmarks.sampling --bench=masked64", ("'masked64'", "--bench=sample256")),
    Wrong("benchmarks.attention --lengths 30", ("'30'", "--lengths=29")),
    Wrong("benchmarks.attention --seconds=0", ("0", "--seconds=")),
    Wrong("benchmarks.loop --bench=masked64 --caches dsik", ("'dsik'", "--caches")),
    Wrong("benchmarks.loop", ("--bench", "--bench=")),
    Wrong("benchmarks.loop --bench=masked64 --data_dir=/nowhere", ("/nowhere", "prepare")),
    Wrong("benchmarks.scaling --bench masked64:0", ("'masked64:0'", "masked64:1024")),
    Wrong("benchmarks.scaling --bench mask64", ("'mask64'", "masked64")),
    Wrong("benchmarks.scaling", ("0 GPUs", "type CUDA_VISIBLE_DEVICES=0,1")),
    Wrong("benchmarks.sweep --part ration", ("'ration'", "--part=ratio")),
    Wrong("benchmarks.sweep --plot /nowhere", ("/nowhere", "type")),
    Wrong("benchmarks.sweep --plot {tmp}/text.pt", ("text.pt", "type")),
    Wrong("benchmarks.sweep --data_dir=/nowhere", ("/nowhere", "prepare")),
    Wrong("benchmarks.run --bench masked", ("'masked'", "--bench=masked")),
    Wrong("benchmarks.run --data_dir=/nowhere", ("/nowhere", "prepare")),
    Wrong("benchmarks.peer_torch --bench=whole6", ("type",)),
]  # fmt: skip

EVALUATE = SAMPLE.replace("=sample ", "=evaluate ") + "--config.eval.metrics=swd "
SCORE = "maskdm_jax.quality.score --images={tmp}/images --reference={tmp}/images "
STUDY = "studies.compute_matched --study={tmp}/study.py --out={tmp}/o "
OTHER_STUDY = "studies.compute_matched --out={tmp}/o --arms scratch --study={tmp}/"
PAGE = "studies.page --out={tmp}/o --rows={tmp}/"
STUDIES = [
    Wrong(STUDY, ("neither --piece nor --arms", "--arms scratch")),
    Wrong(STUDY + "--arms scratch low", ("arm low of {tmp}/study.py: optim.lr_peak", "correct")),
    Wrong(STUDY + "--arms scratch --config.sample.steps=5000", ("5000", "sample.steps=1000")),
    Wrong(STUDY + "--arms scratch --config.optim.lr_pek=1", ("optim.lr_pek", "optim.lr_peak=1")),
    Wrong(STUDY + "--piece=al --arms scratch", ("'al'", "type --piece=all")),
    Wrong(STUDY + "--arms scratch wide", ("arm wide", "model.width", "correct the arm")),
    Wrong(STUDY + "--arms scrach", ("'scrach'", "--arms scratch")),
    Wrong(STUDY + "--piece=some", ("'some'", "--piece=all")),
    Wrong(STUDY + "--piece=all --seconds=5", ("--seconds is 5", "type --piece=all")),
    Wrong(STUDY + "--piece=all --seeds 0", ("--seeds is 0", "type --piece=all")),
    Wrong(STUDY + "--arms scratch --seconds=0", ("--seconds is 0.0", "--seconds=1")),
    Wrong(STUDY + "--arms scratch --out={tmp}/a_file", ("--out is {tmp}/a_file", "another --out")),
    Wrong(STUDY + "--arms scratch --out={tmp}/a_file/o", ("a_file/o, which", "another --out")),
    Wrong(
        STUDY + "--arms scratch --config.eval.inception_weights={tmp}/none " + DATA,
        ("{tmp}/none is not a file", "type --config.eval.inception_weights=FILE"),
        lines=1,
    ),
    Wrong(STUDY + "--arms scratch --out=/proc/foo", ("is /proc/foo, where", "another --out")),
    Wrong("studies.compute_matched --study={tmp}/study.py", ("--out is missing", "--out=DIR")),
    Wrong(OTHER_STUDY + "half.py", ("half.py: arm scratch", "sum to 0.5", "correct the file")),
    Wrong(OTHER_STUDY + "negative.py", ("arm scratch is", "not above 0", "correct the file")),
    Wrong(OTHER_STUDY + "no_pairs.py", ("arm scratch is", "(share, {{field: value}})")),
    Wrong(OTHER_STUDY + "no_field.py", ("'optim.lr_pek'", "not a field", "correct the file")),
    Wrong(OTHER_STUDY + "no_arm.py", ("piece all has the arm 'drop'", "correct the file")),
    Wrong(OTHER_STUDY + "no_arms.py", ("ARMS is 5", "correct the file")),
    Wrong(OTHER_STUDY + "unknown_name.py", ("line 8: NameError", "correct the file")),
    Wrong(OTHER_STUDY + "syntax.py", ("line 3", "correct the file")),
    Wrong(PAGE + "none.csv", ("{tmp}/none.csv", "not there", "type --rows=")),
    Wrong(PAGE + "a.png", ("{tmp}/a.png is no text file", "type another path")),
    Wrong(PAGE + "an_empty_folder", ("{tmp}/an_empty_folder is no text", "type another path")),
    Wrong(PAGE + "a_file", ("{tmp}/a_file holds no rows of a study", "type another path")),
    Wrong(
        STUDY.replace("/o ", "/foreign ") + "--arms scratch",
        ("{tmp}/foreign/rows.csv holds no rows", "move it away"),
    ),
    Wrong(
        STUDY.replace("/o ", "/worded ") + "--arms scratch",
        ("{tmp}/worded/rows.csv: a row of drop", "'long'", "correct it"),
    ),
    Wrong(
        STUDY.replace("/o ", "/cut ") + "--arms scratch",
        ("{tmp}/cut/settings.json is damaged", "type --out=FOLDER with a new one"),
    ),
    Wrong(PAGE + "torn.csv", ("{tmp}/torn.csv: the row after 1 others", "remove it, then type")),
    Wrong(PAGE + "quote.csv", ("{tmp}/quote.csv: the row after 1 others", "remove it, then type")),
    Wrong(OTHER_STUDY + "tuples.py", ("piece all is [('scratch', 9.0, 0)]", "a list of Run")),
    Wrong(PAGE + "word.csv", ("a row of scratch", "'long'", "correct it")),
    Wrong(PAGE + "phases.csv", ("a row of scratch", "token", "correct it")),
    Wrong(PAGE + "mixed.csv", ("rows of scratch", "eval.num is not set and 8", "another name")),
    Wrong(PAGE + "twice.csv", ("scratch, 3 s, seed 0 twice", "remove one")),
    Wrong(PAGE + "rows.csv --grids={tmp}/none", ("{tmp}/none", "--grids=DIR/grids")),
    Wrong(
        PAGE + "rows.csv --grids={tmp}/an_empty_folder",
        ("{tmp}/an_empty_folder", "no picture", "--grids=DIR/grids"),
    ),
]

SCORES = [
    Wrong(EVALUATE + "--config.eval.checkpoints=many", ("'many'", "eval.checkpoints=newest")),
    Wrong(EVALUATE + "--config.eval.checkpoints=7", ("'7'", "--config.eval.checkpoints=all")),
    Wrong(EVALUATE + "--config.eval.checkpoints=5:9", ("'5:9'", "eval.checkpoints=all")),
    Wrong(EVALUATE + "--config.eval.metrics=fud", ("fud", "--config.eval.metrics=")),
    Wrong(EVALUATE + "--config.eval.features=700", ("700", "--config.eval.features=768")),
    Wrong(EVALUATE + "--config.eval.num=1", ("eval.num is 1", "--config.eval.num=2")),
    Wrong(EVALUATE + "--config.eval.reference=/nowhere", ("/nowhere", "eval.reference=")),
    Wrong(EVALUATE + "--config.eval.reference={tmp}/a_file", ("{tmp}/a_file", "eval.reference=")),
    Wrong(EVALUATE + "--config.eval.ema_stds=0.5", ("'0.5'", "--config.eval.ema_stds=0.02,0.05")),
    Wrong(EVALUATE + "--config.eval.ema_stds=long", ("'long'", "--config.eval.ema_stds=0.02")),
    Wrong(EVALUATE + "--config.eval.ema_stds=0.1", ("0.1", "--config.eval.ema_stds=0")),
    Wrong(
        EVALUATE + "--config.sample.init_image={tmp}/8x8.png",
        ("init_image is {tmp}/8x8.png", "--config.sample.init_image=''"),
    ),
    Wrong("studies.samplers --workdir={tmp}/run", ("--out", "--out=DIR")),
    Wrong(
        "studies.samplers --workdir={tmp}/run --out={tmp}/o --solvers ddim:logsnr",
        ("'ddim:logsnr'", "--solvers ddim:log_snr:0.0"),
    ),
    Wrong(
        "studies.samplers --workdir={tmp}/run --out={tmp}/foreign --until=0",
        ("{tmp}/foreign/samplers.csv holds no rows", "move it away"),
    ),
    Wrong(
        "studies.samplers --workdir={tmp}/an_empty_folder --out={tmp}/o",
        ("{tmp}/an_empty_folder", "no checkpoint", "type --workdir="),
    ),
    Wrong(
        "studies.samplers --workdir={tmp}/run --out={tmp}/o --evaluations 2000 "
        "--solvers ddim:timestep --config.eval.metrics=swd " + DATA,
        ("--evaluations has 2000", "--evaluations 1000"),
    ),
    Wrong(SAMPLE + "--config.sample.ema_std=0.3", ("0.3", "--config.sample.ema_std=0.28")),
    Wrong(
        MAIN.replace("{tmp}/w", "{tmp}/run") + "--config.optim.ema=power",
        ("(decay there, power here)", "--config.optim.ema=decay"),
    ),
    Wrong("maskdm_jax.quality.score", ("--images is missing", "type")),
    Wrong(SCORE + "--features=700", ("700", "--features=768")),
    Wrong(SCORE + "--metrics=fud", ("'fud'", "--metrics=")),
    Wrong(SCORE + "--num=1", ("1", "--num=2")),
    Wrong(SCORE + "--images=/nowhere", ("/nowhere", "--images")),
    Wrong(SCORE + "--reference={tmp}/an_empty_folder", ("an_empty_folder", "--reference")),
    Wrong(SCORE + "--inception_weights={tmp}/a_file", ("{tmp}/a_file", "--inception_weights")),
    Wrong(SCORE + "--metrics=memorisation", ("--heldout", "--metrics")),
    Wrong("maskdm_jax.compare", ("--runs is missing", "type")),
    Wrong("maskdm_jax.compare --runs {tmp}/run", ("{tmp}/run", "--mode=evaluate")),
    Wrong("maskdm_jax.compare --runs {tmp}/run --over=stap", ("'stap'", "--over=step")),
]

PREPARE_COMMAND = "maskdm_jax.data.prepare --images={tmp}/images --name=a --size=8 "
PREPARE = [
    Wrong("maskdm_jax.data.prepare", ("--images", "type")),
    Wrong(PREPARE_COMMAND + "--quality=500", ("500", "--quality=100")),
    Wrong(PREPARE_COMMAND + "--quality=0", ("0", "--quality=1")),
    Wrong(PREPARE_COMMAND + "--quality=high", ("'high'", "--quality=95")),
    Wrong(PREPARE_COMMAND + "--size=big", ("'big'", "--size=256")),
    Wrong(PREPARE_COMMAND + "--size=0", ("0", "--size=")),
    Wrong(PREPARE_COMMAND + "--size=8,8", ("'8,8'", "--size=8x8")),
    Wrong(PREPARE_COMMAND + "--size=8.5", ("'8.5'", "--size=")),
    Wrong(PREPARE_COMMAND + "--channels=4", ("4", "--channels=3")),
    Wrong(PREPARE_COMMAND + "--encoding=jpg", ("'jpg'", "--encoding=jpeg")),
    Wrong(PREPARE_COMMAND + "--num_processes=0", ("0", "--num_processes=")),
    Wrong(PREPARE_COMMAND + "--name=My-Faces", ("'My-Faces'", "--name=my_faces")),
    Wrong(PREPARE_COMMAND + "--name=", ("--name", "--name=")),
    Wrong(PREPARE_COMMAND + "--images=/nowhere", ("/nowhere", "--images=")),
    Wrong(PREPARE_COMMAND + "--images={tmp}/a_file", ("{tmp}/a_file", "--images=")),
    Wrong(PREPARE_COMMAND + "--images={tmp}/an_empty_folder", ("an_empty_folder", "--images=")),
    Wrong(PREPARE_COMMAND + "--images=gs://bucket/x", ("gs://bucket/x", "type")),
    Wrong(PREPARE_COMMAND + "--data_dir={tmp}/a_file", ("{tmp}/a_file", "--data_dir=")),
    Wrong(PREPARE_COMMAND + "--data_dir=s3://bucket/x", ("s3://bucket/x", "type")),
    Wrong(PREPARE_COMMAND + "--data_dir=/proc/x", ("/proc/x", "--data_dir=")),
    Wrong(PREPARE_COMMAND + "--name=digits --data_dir={tmp}/data", ("digits", "--name=my_digits")),
    Wrong(PREPARE_COMMAND + "--sise=8", ("--sise", "--size")),
]

# (program, what its --help must contain); it ends with 0.
HELP = [
    (
        "main.py",
        (
            "--workdir",
            "--mode",
            "evaluate); default: train",
            "--config.mask.ratio=0.9",
            "W2 --mode=sample",
        ),
    ),
    ("maskdm_jax", ("maskdm train --config=", "maskdm digest")),
    ("launch/compile_check.py", ("--topology", "--config.mask.ratio=0.9", "Exit status")),
    ("maskdm_jax.checkpoint", ("digest", "--step")),
    ("maskdm_jax.weights.torch_io", ("export", "--weights", "--loss_weight")),
    ("maskdm_jax.report", ("WORKDIRS", "--out")),
    ("maskdm_jax.data.prepare", ("--images", "--size")),
    ("maskdm_jax.quality.score", ("--reference", "--features")),
    ("maskdm_jax.compare", ("--runs", "--plot")),
    ("benchmarks.train_step", ("--bench", "--profile")),
    ("benchmarks.sampling", ("--bench", "--seconds")),
    ("benchmarks.attention", ("--lengths", "--seconds")),
    ("benchmarks.loop", ("--bench", "--caches")),
    ("benchmarks.scaling", ("--bench", "CASE:BATCH")),
    ("benchmarks.sweep", ("--part", "--plot")),
    ("benchmarks.run", ("--bench", "--data_dir")),
    ("launch/gpu_host.sh", ("--pretrain", "--dry-run")),
    ("launch/demo.sh", ("OUTPUT_FOLDER",)),
    ("launch/keep_running.sh", ("--restarts", "status 75")),
    ("launch/slurm.sbatch", ("sbatch --nodes=2",)),
    ("launch/tpu_pod.sh", ("create", "--queued")),
]

TABLE = [
    *FIELDS, *PHASES, *FLAGS, *CONFIGS, *SETS, *WEIGHTS, *RUNS, *DEVICES, *LAUNCH, *BENCHMARKS,
    *PREPARE, *SCORES, *STUDIES,
]  # fmt: skip

_CONFIG = "from maskdm_jax.config import default_config\n\n\ndef get_config():\n"
_STUDY = """from configs import pretrain_digits


def get_config():
    return pretrain_digits.get_config()


"""
_PIECES = "PIECES = {'all': [Run('scratch', 9.0, 0)]}\n"
_ARMS = "from studies.arms import Run\nARMS = {'scratch': %s}\n" + _PIECES
_CELLS = "9,1,50,a,b,H100,1"
_ROW = f"scratch,3.0,0,0.5,[],{_CELLS},"
_ROWS = (
    "arm,seconds,seed,fid768,phases,images,n,steps,reference_sha256,network_sha256,device,"
    "memorisation_share768,fields\n"
)
FILES = {
    "a_file": "text",
    "study.py": _STUDY + _ARMS % "[(1.0, {})]" + "ARMS['low'] = [(1.0, {'optim.lr_peak': -1.0})]\n"
    "ARMS['wide'] = [(1.0, {'model.width': 'x'})]\n",
    "half.py": _STUDY + _ARMS % "[(0.5, {})]",
    "negative.py": _STUDY + _ARMS % "[(1.5, {}), (-0.5, {})]",
    "no_pairs.py": _STUDY + _ARMS % "[(1.0,)]",
    "no_field.py": _STUDY + _ARMS % "[(1.0, {'optim.lr_pek': 1.0})]",
    "no_arm.py": _STUDY + (_ARMS % "[(1.0, {})]").replace("Run('scratch'", "Run('drop'"),
    "no_arms.py": f"{_STUDY}ARMS = 5\nPIECES = {{}}\n",
    "unknown_name.py": f"{_STUDY}ARMS = arms\n",
    "rows.csv": f"{_ROWS}{_ROW}\n",
    "torn.csv": f"{_ROWS}{_ROW}\nscratch,3.0",
    "quote.csv": f"{_ROWS}{_ROW}\n" + 'scratch,3.0,0,0.5,"[1, ',
    "tuples.py": _STUDY + (_ARMS % "[(1.0, {})]").replace("Run('", "('"),
    "word.csv": f"{_ROWS}{_ROW.replace('3.0', 'long')}\n",
    "phases.csv": f"{_ROWS}{_ROW.replace('[]', '[{}]')}\n",
    "mixed.csv": f"{_ROWS}{_ROW}\n" + _ROW.replace(",0,", ",1,") + '"[[1, {""eval.num"": 8}]]"\n',
    "twice.csv": f"{_ROWS}{_ROW}\n{_ROW}\n",
    "a.json": '{"seed": 0}',
    "syntax.py": "def get_config():\n    return 1\nif:\n",
    "no_module.py": "import nowhere\n",
    "raises.py": "\n\ndef get_config():\n    return 1 / 0\n",
    "stops.py": "import sys\nsys.exit(0)\n",
    "no_function.py": "seed = 0\n",
    "returns_none.py": f"{_CONFIG}    default_config()\n",
    "returns_dict.py": "def get_config():\n    return {'seed': 0}\n",
    "other_fields.py": "from ml_collections import config_dict\n\n\ndef get_config():\n"
    "    return config_dict.ConfigDict({'seed': 0, 'steps': 3})\n",
    "unknown_field.py": f"{_CONFIG}    c = default_config()\n    c.mask.ration = 1\n    return c\n",
    "wrong_type.py": f"{_CONFIG}    c = default_config()\n    c.mask.ratio = 'x'\n    return c\n",
    "wrong_value.py": f"{_CONFIG}    c = default_config()\n    c.mask.ratio = 3.0\n    return c\n",
    "needs_argument.py": "def get_config(size):\n    return size\n",
    "variants.py": "ARGUMENTS = ('ours', 'paper')\n\n\ndef get_config(name):\n    return name\n",
    "text.pt": "these are no weights\n",
    "empty.pt": "",
}


# Of studies: folder, file and its text.
OUTS = (
    ("foreign", "rows.csv", "a,b\n1,2\n"),
    ("foreign", "samplers.csv", "a,b\n1,2\n"),
    ("worded", "rows.csv", "arm,seconds,seed\ndrop,long,0\n"),
    ("cut", "settings.json", '{"shared": {'),
)


# A white pixel.
_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTgUqwAAAABJRU5ErkJggg=="
)


ZIPS = {
    "empty.zip": {},
    "text.zip": {"a.jpg": b"these are no pixels"},
    "pixel.zip": {"a.png": base64.b64decode(_PNG)},
}


class _Code:
    def __reduce__(self):
        return os.system, ("true",)


def make(folder: pathlib.Path) -> None:
    """The files and runs that the rows name, in `folder`."""
    from PIL import Image

    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "an_empty_folder").mkdir()
    for name, file, text in OUTS:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file).write_text(text)
    (folder / "no_wandb").mkdir()
    (folder / "no_wandb/wandb.py").write_text("raise ImportError(\"No module named 'wandb'\")\n")
    (folder / "code.pt").write_bytes(pickle.dumps({"model": _Code()}, protocol=2))
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "no weights " * 100)
    with zipfile.ZipFile(folder / "code_in_zip.pt", "w") as archive:
        archive.writestr("a/data.pkl", (folder / "code.pt").read_bytes())
        archive.writestr("a/version", "3")
    whole = (folder / "zip.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    for name, members in ZIPS.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
    whole = (folder / "pixel.zip").read_bytes()
    (folder / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (folder / "a_lmdb").mkdir()
    (folder / "a_lmdb/data.mdb").write_bytes(b"no database")
    (folder / "images").mkdir()
    for name in ("images/0.png", "images/1.png"):
        (folder / name).write_bytes(base64.b64decode(_PNG))
    Image.new("L", (8, 8)).save(folder / "8x8.png")
    train = MAIN.replace("{tmp}/w", "{tmp}/run").format(tmp=folder)
    code, out, err = attempt(f"{train} --config.checkpoint.every_steps=1", {})
    assert code == 0, err
    code, out, err = attempt(f"{EXPORT} --out={{tmp}}/official.pt".format(tmp=folder), {})
    assert code == 0, err
    whole = (folder / "official.pt").read_bytes()
    (folder / "truncated_official.pt").write_bytes(whole[: len(whole) // 2])
    code, out, err = _fork(lambda: _save_other_uvit(folder / "other_uvit.pt"))
    assert code == 0, err
    shutil.copytree(folder / "run", folder / "sampled")
    (folder / "sampled/samples/a").mkdir(parents=True)
    (folder / "sampled/samples/a/grid.png").write_bytes(b"")
    shutil.copytree(folder / "run", folder / "broken")
    (folder / "broken/checkpoints/1/state/manifest.ocdbt").write_bytes(b"")
    code, out, err = _fork(lambda: _save_nan(folder))
    assert code == 0, err


def _save_other_uvit(path):
    """The state dict of a U-ViT that ends with a convolution."""
    import numpy as np

    from maskdm_jax.weights import torch_file

    shapes = {"pos_embed": (1, 5, 8), "in_blocks.0.norm1.weight": (8,),
              "decoder_pred.weight": (12, 8), "final_layer.weight": (3, 3, 3, 3)}  # fmt: skip
    torch_file.save(path, {k: np.zeros(shape, np.float32) for k, shape in shapes.items()})


def _save_nan(folder):
    """A run whose parameters are not all finite, with hashes that fit."""
    import jax
    import numpy as np

    from maskdm_jax import checkpoint, sharding
    from maskdm_jax.state import init_state

    config = checkpoint.load_config(folder / "run", 1)
    state = init_state(config, sharding.make_mesh(config))
    params = jax.tree.map(np.asarray, state.params)
    params["patch_embed"]["kernel"] = params["patch_embed"]["kernel"] * np.nan
    checkpoints = checkpoint.Checkpoints(folder / "nan", config)
    checkpoints.save(1, state.replace(params=params, ema=params), force=True)
    checkpoints.close()


def faults(row: Wrong, folder: pathlib.Path) -> tuple[list[str], str]:
    """(what falls short in the answer to a row, the answer)."""
    command = row.command.format(tmp=folder)
    for name in ("w", "o", "x"):  # an input that was accepted leaves something there
        shutil.rmtree(folder / name, ignore_errors=True)
    env = {name: value.format(tmp=folder) for name, value in row.env}
    code, out, err = attempt(command, env)
    found = []
    if code != row.code:
        found.append(f"exit code {code}, not {row.code}")
    if "Traceback" in out + err:
        found.append("a stack trace")
    lines = err.splitlines()
    sentences = [line for line in lines if line.startswith("error: ")]
    if len(sentences) != 1 or len(lines) != 1 + row.lines:
        found.append(f"{len(lines)} lines on stderr, {len(sentences)} of them 'error: '")
    sentence = sentences[0] if sentences else ""
    if not re.search(r"\btype:? ", sentence):
        found.append("does not say what to type")
    if len(sentence) > 700:
        found.append(f"{len(sentence)} characters")
    found += [f"lacks {says}" for says in row.says if says.format(tmp=folder) not in sentence]
    if row.retry is not None and not found:
        typed = " ".join(
            re.findall(r'--[\w.]+=(?:"[^"]*"|\'[^\']*\'|[^\s,;]+)', sentence.split("type", 1)[1])
        )
        kept = command.rpartition(" ")[0] if row.instead else command
        again = f"{kept} {typed}{row.retry.format(tmp=folder)}"
        _, _, then = attempt(again, env)
        if row.after not in then or sentence in then:
            found.append(f"after {typed!r}: {then.strip()[-300:]}")
    return found, err.strip()


def attempt(command: str, env: dict[str, str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a program of this repository."""
    program, *arguments = shlex.split(command)
    is_module = not program.endswith((".py", ".sh", ".sbatch"))
    if env or not (is_module or program.endswith(".py")):
        start = [sys.executable, *(["-m"] * is_module), program]
        if program.endswith((".sh", ".sbatch")):
            start = ["bash", program]
        done = subprocess.run(
            [*start, *arguments],
            env={**os.environ, **env},
            cwd=ROOT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )
        return done.returncode, done.stdout, done.stderr

    def work():
        sys.argv = [program, *arguments]
        if is_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(ROOT))
            runpy.run_path(str(ROOT / program), run_name="__main__")

    return _fork(work)


def _fork(work):
    """Runs `work` as a program in a fork of this process."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(300)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                work()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else end.code is not None
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), out.read(), err.read()


def prepared() -> None:
    """Imports what the programs import, for all forks; starts no thread and touches no device."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import warnings

    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    import importlib

    for name in ("sample", "train", "data.prepare", "report.page"):
        importlib.import_module(f"maskdm_jax.{name}")


def main(word: str = "") -> int:
    """Prints the answer to every row whose label has `word`; 1 if some fall short."""
    prepared()
    rows = [row for row in TABLE if word in row.label]
    helps = [(program, says) for program, says in HELP if word in f"{program} --help"]
    short = 0
    for program, says in helps:
        code, out, err = attempt(f"{program} --help", {})
        if code or err or not all(text in out for text in says):
            short += 1
            print(f"SHORT {program} --help: exit code {code}\n{err}{out[:500]}")
    with tempfile.TemporaryDirectory() as folder:
        make(pathlib.Path(folder))
        for row in rows:
            found, answer = faults(row, pathlib.Path(folder))
            short += bool(found)
            print(
                f"{'SHORT' if found else 'ok   '} {row.label}\n      {answer}".replace(folder, "")
            )
            print("".join(f"      - {fault}\n" for fault in found), end="", flush=True)
    print(f"{short} of {len(rows) + len(helps)} fall short")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
