"""Packaging of megatron_dtrpo: what it needs to run, and what each optional part of it needs beyond that."""

from pathlib import Path

from setuptools import find_packages, setup

readme = Path(__file__).parent / "README.md"

setup(
    name="megatron-dtrpo",
    version="0.1.0",
    description="Preference training (dTRPO) of block-diffusion language models on megatron-core",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_dtrpo", "megatron_dtrpo.*"]),
    # The page that replays a decoding.
    package_data={"megatron_dtrpo.inference": ["*.html", "*.css", "*.js"]},
    install_requires=[
        "megatron-core>=0.16",
        "torch>=2.6",
        "numpy",
        # megatron-core does not declare it, but its dist_checkpointing hangs for ever without it: the processes
        # that write a checkpoint die on the import, and their parent waits for them.
        "psutil",
        "transformers",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "pyyaml",
        "tqdm",
        "pyarrow",
    ],
    extras_require={
        # The range that megatron-core 0.16 works with. Not for machines without a GPU, where its wheels make
        # `import megatron.core` fail.
        "te": ["transformer-engine[pytorch]>=2.9,<2.12"],
        "wandb": ["wandb"],
        "eval": ["lm-eval>=0.4.13,<0.5"],
        "datasets": ["datasets"],
        "verify": ["math-verify>=0.9,<1"],
        "examples": ["matplotlib"],
        "benchmark": ["trl>=1.16,<2"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff"],
    },
)
