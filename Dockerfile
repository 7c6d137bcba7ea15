# syntax=docker/dockerfile:1
# For nodes with NVIDIA GPUs. torch 2.13, which vllm 0.32 pins, is built for CUDA 13; the driver must be 580 or newer.
#
#   docker build -t neox-rl --build-arg UID=$(id -u) --build-arg GID=$(id -g) .
#   docker run --rm -it --gpus all --shm-size=16g --network=host -v "$PWD/runs:/neox-rl/runs" neox-rl \
#       python deepy.py train.py configs/metarl.yml
#
# Several nodes: --network=host, so that the addresses in endpoints.json are the nodes' own, and InfiniBand with
# --device=/dev/infiniband --ulimit memlock=-1. A GPT-NeoX checkout: -v /path/to/gpt-neox:/gpt-neox:ro -e
# GPT_NEOX_PATH=/gpt-neox. Hugging Face checkpoints and tokenizers: -v "$HOME/.cache/huggingface:/home/neox/.cache/huggingface".
# Not with tools/slurm/: the launcher calls srun and scontrol, which are not in the image. `launcher: pdsh` and `openmpi` go by ssh, which must lead into the containers
# of the other nodes: an sshd in them is yours to set up, the image has the clients alone. GPT-NeoX's own kernels are not in it: their build
# (megatron/fused_kernels at ea7aefd8) asks nvcc for sm_70, which CUDA 13 does not compile for; torch computes the same functions.
#
# How far this file is checked: hadolint 2.15 has nothing to say, a test finds every path and extra that it names, the install before the
# source is copied works on those two files, and the extras resolve for Python 3.11 and the glibc 2.34 of Rocky Linux 9 (torch 2.13.0, vllm
# 0.32.0, mpi4py 4.1, CUDA 13.0 runtime; all but deepspeed from wheels). Others build on this base image and take pdsh from EPEL 9. It was
# never built here: base image and dnf packages are untried.
ARG CUDA=13.0.0
FROM nvidia/cuda:${CUDA}-devel-rockylinux9

# The compiler and the headers serve triton and DeepSpeed, which build kernels on first use; Open MPI serves mpi4py and mpirun.
# DeepSpeed's launcher `pdsh` is in EPEL, without its ssh module, which is a package of its own.
# hadolint ignore=DL3041
RUN dnf install -y epel-release \
    && dnf install -y python3.11 python3.11-devel python3.11-pip gcc-c++ make git openssh-clients openmpi procps-ng pdsh pdsh-rcmd-ssh \
    && dnf clean all
ENV PATH=/opt/venv/bin:/usr/lib64/openmpi/bin:${PATH} \
    LD_LIBRARY_PATH=/usr/lib64/openmpi/lib:${LD_LIBRARY_PATH} \
    CUDA_HOME=/usr/local/cuda \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# Before the source is copied, so that a change of source does not install 10 GB again.
WORKDIR /neox-rl
COPY setup.py pyproject.toml ./
RUN mkdir neox_rl megatron_patches \
    && touch neox_rl/__init__.py megatron_patches/__init__.py \
    && python3.11 -m venv /opt/venv \
    && pip install -e ".[gpu,mpi,neox,dev]"

ARG UID=1000
ARG GID=1000
RUN (getent group "${GID}" || groupadd --gid "${GID}" neox) \
    && useradd --non-unique --uid "${UID}" --gid "${GID}" --create-home neox \
    && mkdir -p runs /gpt-neox /home/neox/.cache/huggingface \
    && chown -R "${UID}:${GID}" /neox-rl /gpt-neox /home/neox
COPY --chown=${UID}:${GID} . .

USER ${UID}:${GID}
CMD ["python", "tools/doctor.py"]
