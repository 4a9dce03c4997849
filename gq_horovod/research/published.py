"""What the paper and its authors' logs say, for the reports: figures, with their sources."""

from __future__ import annotations

from ..advisor.model import PUBLISHED, WORKLOADS

SOURCE = "arXiv 2305.18627 (ECAI 2025)"

# Final quality in the paper's full runs, 8 bits: metric of the workload -> method -> value.
PUBLISHED_QUALITY: dict[str, tuple[str, dict[str, float]]] = {
    "transformer-xl": (
        "perplexity",  # of the test set of WikiText-103
        {
            "none": 23.88,
            "standard": 33.16,
            "exponential": 24.59,
            "qsgd": 31.75,
            "powersgd": 24.28,
        },
    ),
    "wide-resnet": (
        "accuracy",  # top-1, MiniImageNet
        {
            "none": 0.6682,
            "standard": 0.6929,
            "exponential": 0.6588,
            "qsgd": 0.6966,
            "powersgd": 0.6814,
        },
    ),
}
# Workload -> where -> method -> times as fast as AUTHORS_BASELINE. What is said of 64 nodes names
# no method: it is their best one.
THEIR_BEST = "their best"
PUBLISHED_SPEED_UPS: dict[str, dict[str, dict[str, float]]] = {
    "deeplight": {
        "paper, 64 nodes": {THEIR_BEST: PUBLISHED[0][1]},
        "poster, 64 nodes": {THEIR_BEST: PUBLISHED[1][1]},
        "paper, 4 GPUs": {"standard 8 bit": 3.58, "exponential 8 bit": 3.11},
    },
}
PUBLISHED_HOSTS = 64
_NAMES_IN_PAPER = {
    "deeplight": "DeepLight",
    "transformer-xl": "Transformer-XL",
    "wide-resnet": "Wide-ResNet-101-2",
}
PUBLISHED_PARAMETERS = {
    name: workload.parameters
    for name, in_paper in _NAMES_IN_PAPER.items()
    for workload in WORKLOADS
    if workload.name == in_paper
}

# The repository sands-lab/global-qsgd, commit 13d702f, has logs of runs on one host, of which these
# are the figures.
AUTHORS_SOURCE = "sands-lab/global-qsgd, commit 13d702f"
AUTHORS_HARDWARE = "4 × A100-SXM4-80GB of one host, PyTorch 1.13.1"
AUTHORS_BASELINE = "a float32 tree over NCCL's send and receive, not NCCL's Allreduce"
OUR_BASELINE = "Horovod's float32 Allreduce, the method none"
# How GPUs reach each other: directly, or, with NCCL_P2P_DISABLE=1, by the host's memory.
_DIRECT, _BY_HOST = "P2P", "by host memory"
# Workload -> what was timed, and seconds by path and method.
AUTHORS_LOGS: dict[str, tuple[str, dict[str, dict[str, float]]]] = {
    "deeplight": (
        "epoch 1",
        {
            _DIRECT: {
                "none": 40.7,
                "standard 8 bit": 24.2,
                "exponential 8 bit": 29.3,
                "standard 4 bit": 33.2,
                "qsgd": 46.7,
                "powersgd": 41.5,
                "L-GreCo": 50.8,
            },
            _BY_HOST: {
                "none": 442.7,
                "standard 8 bit": 124.7,
                "exponential 8 bit": 143.5,
                "standard 4 bit": 86.2,
            },
        },
    ),
    "transformer-xl": (
        "a step",
        {
            _DIRECT: {
                "none": 0.632,
                "standard 8 bit": 0.603,
                "exponential 8 bit": 0.616,
                "standard 4 bit": 0.619,
            },
            _BY_HOST: {
                "none": 1.373,
                "standard 8 bit": 0.786,
                "exponential 8 bit": 0.815,
                "standard 4 bit": 0.715,
            },
        },
    ),
    "wide-resnet": (
        "a step",
        {
            _DIRECT: {
                "none": 0.097,
                "standard 8 bit": 0.081,
                "exponential 8 bit": 0.103,
                "standard 4 bit": 0.093,
            },
            _BY_HOST: {
                "none": 0.545,
                "standard 8 bit": 0.187,
                "exponential 8 bit": 0.217,
                "standard 4 bit": 0.145,
            },
        },
    ),
}
