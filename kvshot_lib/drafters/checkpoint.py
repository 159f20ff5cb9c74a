"""Trained drafters on disk: weights as safetensors, what they are as JSON beside them; whole, or rounded.

Rounding keeps about three bits a weight, so that a drafter is small enough to be tracked. A matrix is
rounded row by row to multiples of ``step`` standard deviations of the row, kept as int8 counts and one
float16 scale a row. Small counts are frequent and large ones rare, and a Huffman code (zlib's, without
its search for repetitions, of which there are none) gives them short and long words: for bell-shaped rows
about log2(4.13 / step) bits a weight, 3.1 at .5 (entropy of a Gaussian less the log of the step).
Rounding errs by step / √12 of a standard deviation, root mean square: a seventh at .5. Vectors (norms,
biases) and token ids stay as they are.
"""

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import StudyError
from ..features.spec import FeatureSpec, check_origin, feature_spec
from ..files import read_json, sha256, write_atomically, write_json
from ..settings import check_settings
from ..target.load import Target
from .drafter import Drafter, DrafterConfig, build_drafter
from .runs import DESCRIPTION, NOTEBOOK

WEIGHTS = "drafter.safetensors"
STEP = 0.5
COUNTS, SCALES = ".counts", ".scales"


def save_drafter(drafter: Drafter, folder: str | Path, **facts) -> None:
    """Write weights and draft vocabulary, then the description (config, target, weight hash and any ``facts``)."""
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    tensors["draft_ids"] = drafter.draft_ids.cpu()
    write_atomically(folder / WEIGHTS, lambda p: save_file(tensors, p))
    described = {**drafter.description(), "weights_sha256": sha256(folder / WEIGHTS), **facts}
    write_json(folder / DESCRIPTION, described)


def load_drafter(folder: str | Path, target: Target) -> Drafter:
    """Read a drafter back for the target that it was trained with.

    Raises
    ------
    StudyError : no drafter there, altered weights, or another target or tokenizer.
    """
    kept = _read(Path(folder))
    check_origin(kept.spec, target, f"the drafter in {folder} was trained")
    told = f"the drafter in {folder} is not what {DESCRIPTION} describes"
    try:
        spec = feature_spec(target, kept.spec.kv_layers, kept.spec.hidden_layers)
        if replace(spec, target=kept.spec.target) != kept.spec:
            raise StudyError(f"{target.name} has other sizes")
        drafter = build_drafter(kept.config, target, kept.spec, kept.draft_ids)
    except StudyError as error:
        raise StudyError(f"{told}, or for another target: {error}") from error
    load_weights(drafter, kept.tensors, told)
    return drafter.eval()


def read_description(folder: str | Path) -> dict:
    """What a drafter's ``drafter.json`` says, its weights checked by their hash."""
    return _read(Path(folder)).description


def warm_start(drafter: Drafter, folder: str | Path) -> list[str]:
    """Copy every weight that a trained drafter of the same target and draft vocabulary shares by name (``init_from``).

    Returns
    -------
    Names of the parameters that stay as they were.

    Raises
    ------
    StudyError : no drafter there, or another target or draft vocabulary.
    """
    draft_ids = drafter.draft_ids.cpu()
    kept = _read(Path(folder))
    check_origin(kept.spec, drafter.spec, f"can't start from {folder}: it was trained")
    if not torch.equal(kept.draft_ids, draft_ids):
        raise StudyError(
            f"can't start from {folder}: it drafts from another vocabulary ({_named(kept.draft_ids)}, not "
            f"{_named(draft_ids)}); train both with the same draft_vocab_size and features"
        )
    own = drafter.state_dict()
    shared = {name: tensor for name, tensor in kept.tensors.items() if name in own and own[name].shape == tensor.shape}
    drafter.load_state_dict(shared, strict=False)
    return sorted(set(own) - set(shared))


def load_weights(drafter: Drafter, tensors: Mapping[str, torch.Tensor], told: str) -> None:
    """Fill a drafter with weights that must all be there and fit; ``told`` begins the line if they don't."""
    try:
        drafter.load_state_dict(tensors)
    except RuntimeError as error:
        raise StudyError(f"{told} ({str(error).splitlines()[-1].strip()}); train or fetch it again") from error


def draft_vocabulary(answer_token_counts: torch.Tensor, size: int) -> torch.Tensor:
    """The ``size`` most frequent target tokens in the training answers, as sorted ids; ties go to the lower id.

    >>> draft_vocabulary(torch.tensor([5, 0, 7, 5]), 2)
    tensor([0, 2])
    """
    if not 1 <= size <= len(answer_token_counts):
        raise StudyError(f"draft_vocab_size={size} must be from 1 to the target's {len(answer_token_counts)} tokens")
    return torch.argsort(answer_token_counts, descending=True, stable=True)[:size].sort().values


def _named(draft_ids: torch.Tensor) -> str:
    """Size and short hash of a draft vocabulary."""
    return f"{len(draft_ids)} tokens, {hashlib.sha256(draft_ids.numpy().tobytes()).hexdigest()[:8]}…"


@dataclass(frozen=True)
class _Kept:
    """A drafter as it stands in its folder."""

    description: dict
    spec: FeatureSpec
    config: DrafterConfig
    draft_ids: torch.Tensor
    tensors: dict[str, torch.Tensor]


def _read(folder: Path) -> _Kept:
    """A trained drafter, checked."""
    if not (folder / DESCRIPTION).exists():
        made = "which leaves it in results_dir/runs/<variant>/seed<seed>"
        raise StudyError(f"no trained drafter in {folder}; train it with {NOTEBOOK}, {made}")
    remedy = "delete that folder and train the drafter again"
    description = read_json(folder / DESCRIPTION, remedy)
    if not {"weights_sha256", "spec", "config"} <= set(description):
        raise StudyError(f"{folder / DESCRIPTION} is damaged; {remedy}")
    if not (folder / WEIGHTS).exists() or sha256(folder / WEIGHTS) != description["weights_sha256"]:
        raise StudyError(f"the weights in {folder} are missing or altered; {remedy}")
    try:
        tensors = (load_rounded if "rounding_step" in description else load_file)(folder / WEIGHTS)
        spec, config = FeatureSpec.from_json(description["spec"]), DrafterConfig(**description["config"])
        check_settings(spec)
        ids = tensors.pop("draft_ids")
    except (SafetensorError, AttributeError, KeyError, TypeError, StudyError) as error:
        raise StudyError(f"the drafter in {folder} can't be read ({error}); {remedy}") from error
    if not len(ids) or not torch.equal(ids, ids.unique()) or not 0 <= int(ids[0]) <= int(ids[-1]) < spec.vocab_size:
        raise StudyError(f"the draft vocabulary in {folder} is not made of tokens of {spec.target}; {remedy}")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise StudyError(f"the weights in {folder} are not finite ({', '.join(broken)}); {remedy}")
    return _Kept(description, spec, config, ids, tensors)


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
