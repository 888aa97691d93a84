"""Package metadata. fairseq itself is installed by scripts/setup.sh or by hand (see README):
its wheel must be compiled against the torch that is already installed, which pip's isolated
builds do not do, so it is not a dependency that pip could resolve well."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "fairseq_autosize/__init__.py").read_text(), re.M
).group(1)

setup(
    name="fairseq-autosize",
    version=VERSION,
    description="Auto-sizing Transformers for fairseq: proximal l2,1 and linf,1 training",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["fairseq_autosize", "fairseq_autosize.*"]),
    package_data={"fairseq_autosize": ["*.jinja"]},
    install_requires=["torch>=2.6", "sacrebleu>=2.0"],
    extras_require={
        "test": [
            "pytest>=7",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "scipy",
            "ruff",
            "sentencepiece",
            "subword-nmt",
            "tensorboardX",
        ],
        "plot": ["matplotlib"],
        "experiments": [
            "hydra-joblib-launcher",
            "hydra-optuna-sweeper",
            "hydra-submitit-launcher",
            "portalocker",
            "rich",
            "sentencepiece",
            "torch-pruning",
        ],
        "ctranslate2": ["ctranslate2>=4.8.1"],
    },
    entry_points={"console_scripts": ["fairseq-autosize = fairseq_autosize.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
    ],
)
