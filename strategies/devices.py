"""What known accelerators can do at most, to compare with what a model makes of them.

Dense peaks (no structured sparsity) from the makers' data sheets, in FLOP/s: bf16 on tensor cores, float32 on
the ordinary ones (PyTorch does not use TF32 for matrix products unless it is told to).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TERA = 1e12


@dataclass(frozen=True, slots=True)
class Peaks:
    """FLOP/s; None: it has no such units, or they are not known."""

    bf16: float | None
    float32: float | None


KNOWN: dict[str, Peaks] = {
    # NVIDIA Blackwell, HGX B200 data sheet (per GPU; its bf16 figure is with sparsity, half of it dense)
    "NVIDIA B200": Peaks(2250 * TERA, 75 * TERA),
    # NVIDIA H100 Tensor Core GPU Architecture (white paper), table 2; H200 and H100 NVL data sheets
    "NVIDIA H200": Peaks(989.4 * TERA, 66.9 * TERA),
    "NVIDIA H100 80GB HBM3": Peaks(989.4 * TERA, 66.9 * TERA),
    "NVIDIA H100 PCIe": Peaks(756 * TERA, 51.2 * TERA),
    "NVIDIA H100 NVL": Peaks(835.5 * TERA, 60 * TERA),
    # NVIDIA A100 Tensor Core GPU Architecture (white paper), table 3
    "NVIDIA A100-SXM4-40GB": Peaks(312 * TERA, 19.5 * TERA),
    "NVIDIA A100-SXM4-80GB": Peaks(312 * TERA, 19.5 * TERA),
    "NVIDIA A100-PCIE-40GB": Peaks(312 * TERA, 19.5 * TERA),
    "NVIDIA A100 80GB PCIe": Peaks(312 * TERA, 19.5 * TERA),
    # NVIDIA L40S, L4, A10 and T4 data sheets
    "NVIDIA L40S": Peaks(362 * TERA, 91.6 * TERA),
    "NVIDIA L4": Peaks(121 * TERA, 30.3 * TERA),
    "NVIDIA A10": Peaks(125 * TERA, 31.2 * TERA),
    "Tesla T4": Peaks(None, 8.1 * TERA),
    # NVIDIA V100 data sheet
    "Tesla V100-SXM2-16GB": Peaks(None, 15.7 * TERA),
    "Tesla V100-SXM2-32GB": Peaks(None, 15.7 * TERA),
    "Tesla V100-PCIE-16GB": Peaks(None, 14 * TERA),
}
"""By the name that the driver gives."""


def known_peak(device: torch.device, *, autocast: bool) -> float | None:
    """The dense peak of ``device`` in FLOP/s for the precision that is computed in; None where it is not
    known, as for every CPU."""
    if device.type != "cuda":
        return None
    return peak_of(
        torch.cuda.get_device_name(device),
        autocast=autocast,
        tf32=torch.get_float32_matmul_precision() != "highest",
    )


def peak_of(name: str, *, autocast: bool, tf32: bool) -> float | None:
    """As ``known_peak``, by the device's name. ``tf32``: float32 products are computed in something else."""
    peaks = KNOWN.get(name)
    if peaks is None:
        return None
    if autocast:
        return peaks.bf16
    return None if tf32 else peaks.float32
