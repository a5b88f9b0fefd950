"""What there is: versions, the GPU, what it reaches on plain work, and which attention, optimizers
and engines can run.
"""

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from benchmarks.gpu.piece import Piece, milliseconds, run
from ipt.config import TrainerConfig
from ipt.training.attention import resolve_attention
from ipt.training.metrics import named_peak

PACKAGES = (
    "torch triton transformers lightning bitsandbytes flash-attn flash-attn-3 flash-attn-4 "
    "liger-kernel vllm ray hydra-core wandb pytest"
)
KERNELS = (
    "auto",
    "packed",
    "sdpa",
    "varlen",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)


def measure(piece: Piece) -> None:
    for package in PACKAGES.split():
        try:
            piece.row("Packages", {"package": package, "version": version(package)})
        except PackageNotFoundError:
            piece.row("Packages", {"package": package, "version": "not installed"})
    imports(piece)
    for name in KERNELS:
        try:
            config = TrainerConfig(
                accelerator="cpu" if piece.smoke else "gpu",
                precision="bf16-mixed",
                attn_implementation=name,
            )
            piece.row(
                "Attention (trainer.attn_implementation)",
                {"asked": name, "runs": resolve_attention(config)},
            )
        except ValueError as error:
            piece.row(
                "Attention (trainer.attn_implementation)", {"asked": name, "runs": str(error)}
            )
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,compute_cap"
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        piece.note(f"nvidia-smi ({query.partition('=')[2]}): {answer.stdout.strip()}")
    rates(piece)


def imports(piece: Piece) -> None:
    """Whether what is compiled for a GPU can be loaded: each in a process of its own, since some
    end it when they cannot.
    """
    for module in (
        ("bitsandbytes",)
        if piece.smoke
        else ("bitsandbytes", "flash_attn", "flash_attn.cute", "liger_kernel", "vllm")
    ):
        if find_spec(module.partition(".")[0]) is None or not piece.reach(f"import {module}", 60):
            continue
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        said = done.stderr.strip().splitlines() or [""]
        piece.row(
            "Imports",
            {
                "module": module,
                "exit code": done.returncode,
                "last words": said[-1] if done.returncode else "",
            },
        )


def rates(piece: Piece) -> None:
    """Matrix products in bf16 and copies within the device: what no training can be faster than."""
    size, numbers = (256, 1 << 20) if piece.smoke else (8192, 1 << 31)
    left, right = (
        torch.randn(size, size, device=piece.device, dtype=torch.bfloat16) for _ in range(2)
    )
    flops = 2 * size**3 / milliseconds(lambda: left @ right, piece.device) * 1000
    peak = named_peak("" if piece.smoke else torch.cuda.get_device_name())
    piece.row(
        "Rates",
        {
            "what": f"{size} x {size} matrix product, bf16",
            "TFLOP/s": flops / 1e12,
            "of the peak": flops / peak if peak else None,
        },
    )
    source = torch.randint(0, 100, (numbers,), dtype=torch.int8, device=piece.device)
    target = torch.empty_like(source)
    copied = 2 * numbers / milliseconds(lambda: target.copy_(source), piece.device) * 1000
    piece.row(
        "Rates",
        {"what": f"copy of {numbers / 2**30:.3g} GiB, read and written", "TB/s": copied / 1e12},
    )


if __name__ == "__main__":
    run("environment", measure)
