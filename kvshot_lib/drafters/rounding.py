"""Weights in about three bits: what makes a trained drafter small enough to be tracked.

A matrix is rounded row by row to multiples of ``step`` standard deviations of the row, kept as int8 counts and one float16 scale a row. Small
counts are frequent and large ones rare, and a Huffman code (zlib's, without its search for repetitions, of which there are none) gives them
short and long words: for bell-shaped rows about log2(4.13 / step) bits a weight, 3.1 at .5 (entropy of a Gaussian less the log of the
step). Rounding errs by step / √12 of a standard deviation, root mean square: a seventh at .5. Vectors (norms, biases) and token ids stay as
they are.
"""

import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import StudyError
from ..files import write_atomically

STEP = 0.5
COUNTS, SCALES = ".counts", ".scales"


def round_rows(matrix: np.ndarray, step: float = STEP) -> tuple[np.ndarray, np.ndarray]:
    """float [rows, columns] -> int8 counts of the same shape and float16 scales [rows, 1]; matrix ≈ counts · scales.

    The scale grows where a row's largest weight would take more than 127 steps.
    """
    matrix = np.asarray(matrix, dtype=np.float32)
    scales = np.maximum(step * matrix.std(1, keepdims=True), np.abs(matrix).max(1, keepdims=True) / 127)
    scales = np.maximum(scales, 2.0**-20).astype(np.float16)  # a row of zeros has a scale too
    counts = np.rint(matrix / scales.astype(np.float32))
    return counts.clip(-127, 127).astype(np.int8), scales


def save_rounded(tensors: dict[str, torch.Tensor], path: str | Path, step: float = STEP) -> Path:
    """Write tensors as safetensors, matrices rounded; equal weights make equal bytes."""
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            counts, scales = round_rows(tensor.detach().cpu().numpy(), step)
            coder = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
            coded = coder.compress(counts.tobytes()) + coder.flush()
            kept[name + COUNTS] = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
            kept[name + SCALES] = torch.from_numpy(scales)
        else:
            kept[name] = tensor.detach().cpu().contiguous()
    return write_atomically(path, lambda p: save_file(kept, p))


def load_rounded(path: str | Path) -> dict[str, torch.Tensor]:
    """Read what `save_rounded` wrote; matrices come back as float32.

    Raises
    ------
    StudyError : no such file, or not one of this kind.
    """
    try:
        kept = load_file(path)
        found = {name: tensor for name, tensor in kept.items() if not name.endswith((COUNTS, SCALES))}
        for name in (name.removesuffix(COUNTS) for name in kept if name.endswith(COUNTS)):
            scales = kept[name + SCALES].numpy().astype(np.float32)
            counts = np.frombuffer(zlib.decompress(kept[name + COUNTS].numpy().tobytes()), dtype=np.int8)
            found[name] = torch.from_numpy(counts.reshape(len(scales), -1) * scales)
    except (OSError, KeyError, ValueError, zlib.error, SafetensorError) as error:
        raise StudyError(f"{path} can't be read ({error}); restore it with git") from error
    return found
