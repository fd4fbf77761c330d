"""Package definition. The tested versions of everything stand in constraints.txt."""

from pathlib import Path

from setuptools import setup

# An extra can only add requirements, so the smaller set has a file of its own.
INFERENCE = [line for line in Path("inference.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
TRAINING = [
    "triton>=3.6; platform_system == 'Linux'",
    "xformers>=0.0.35",
    "nvidia-dali-cuda130>=2.0; platform_system == 'Linux'",
    "pydensecrf2>=1.1",
    "tensorboard>=2.18",
    "plotly>=6.0",
    "scipy>=1.14",
    "kornia>=0.8",
    "pycocotools>=2.0.8",
    "shtab>=1.7",
    "webdataset>=1.0",
    "fsspec>=2026.6",
]
EXPORT = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]
EXCEL = ["openpyxl>=3.1"]
SCIENTIFIC = ["pydicom>=3.0"]
WANDB = ["wandb>=0.18"]
MLFLOW = ["mlflow-skinny>=2.16"]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]

setup(
    name="fsr_fast",
    version="0.2.0.dev0",
    description="Fast, verified training of segmentation networks from image-level labels "
    "(Progressive Feature Self-Reinforcement)",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    keywords=["weakly supervised semantic segmentation", "image-level labels", "vision transformer"],
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        "fsr_fast",
        "fsr_fast.method",
        "fsr_fast.commands",
        "fsr_fast.models",
        "fsr_fast.evaluation",
        "fsr_fast.runtime",
        "fsr_fast.reporting",
        "fsr_fast.reference",
        "fsr_fast.kernels",
        "fsr_fast.dataloading",
        "fsr_fast.configs",
    ],
    package_data={"fsr_fast": ["py.typed"], "fsr_fast.configs": ["*.yaml"], "fsr_fast.reporting": ["templates/*"]},
    install_requires=[*INFERENCE, *TRAINING],
    entry_points={"console_scripts": ["fsr-fast = fsr_fast.cli:main"]},
    extras_require={
        "excel": EXCEL,
        "export": EXPORT,
        "scientific": SCIENTIFIC,
        "docs": DOCS,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "dev": [
            *EXCEL,
            *EXPORT,
            *SCIENTIFIC,
            *DOCS,
            *MLFLOW,
            "rasterio>=1.4",
            "build>=1.2",
            "setuptools>=77",
            "playwright>=1.49",
            "psutil>=6.0",
            "pytest>=8.0",
            "pytest-benchmark>=5.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "mypy>=1.13",
            "types-PyYAML",
            "types-openpyxl",
        ],
    },
)
