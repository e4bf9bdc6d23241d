"""What decides a stage's rounding, beside the weights: two stages with the same id compute the same bits."""

from __future__ import annotations

import platform

import torch


def numerics_id(device: str, kernels: str, *, torch_computes: bool = True) -> str:
    """Torch version, device kind, the device's capability, and the kernel set, in one line.

    Where torch computes nothing, device kind and the kernels' name are all: the name says what decides each bit. On a
    CPU the capability holds torch's own level and the instructions and vendor by which oneDNN and MKL choose
    their code; on CUDA the card and the toolkit.
    """
    kind = torch.device(device).type
    if not torch_computes:
        return f"{kind} | {kernels}"
    if kind == "cuda":
        card = torch.cuda.get_device_properties(torch.device(device))
        capability = f"{card.name} sm{card.major}{card.minor} cuda{torch.version.cuda}"
    else:
        # Young in torch: older versions in our range give their own level only.
        facts: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        chosen = ("avx2", "fma3", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16")
        flags = ",".join(name for name in chosen if facts.get(name))
        vendor = str(facts.get("cpu_name", "")).split(" ")[0]
        capability = f"{platform.machine()} {vendor} {torch.backends.cpu.get_cpu_capability()} {flags}"
    return f"torch {torch.__version__} | {kind} | {capability} | {kernels}"
