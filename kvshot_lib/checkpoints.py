"""Trained drafters on disk: weights as safetensors, what they are as JSON beside them."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .drafters import Drafter, DrafterConfig, build_drafter
from .errors import StudyError
from .features import FeatureSpec
from .files import sha256, write_atomically, write_json
from .target import Target

WEIGHTS, DESCRIPTION = "drafter.safetensors", "drafter.json"


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
    StudyError : no drafter there, altered weights, or another target.
    """
    description, tensors = _read(Path(folder))
    spec = description["spec"]
    if spec["target_hash"] != target.hash:
        raise StudyError(
            f"the drafter in {folder} was trained for target {spec['target']} ({spec['target_hash'][:8]}…), "
            f"not for {target.name} ({target.hash[:8]}…); load that target or train a drafter for this one"
        )
    config, spec = DrafterConfig(**description["config"]), FeatureSpec.from_json(spec)
    drafter = build_drafter(config, target, spec, tensors.pop("draft_ids"))
    drafter.load_state_dict(tensors)
    return drafter.eval()


def warm_start(drafter: Drafter, folder: str | Path) -> list[str]:
    """Copy every weight that a trained drafter of the same target and draft vocabulary shares by name (``init_from``).

    Returns
    -------
    Names of the parameters that stay as they were.

    Raises
    ------
    StudyError : no drafter there (names the notebook that makes it), or another target or draft vocabulary.
    """
    description, tensors = _read(Path(folder))
    if description["spec"]["target_hash"] != drafter.spec.target_hash:
        raise StudyError(
            f"can't start from {folder}: it was trained for another target ({description['spec']['target']})"
        )
    draft_ids = tensors.pop("draft_ids")
    if not torch.equal(draft_ids, drafter.draft_ids.cpu()):
        raise StudyError(f"can't start from {folder}: it drafts from another vocabulary ({len(draft_ids)} tokens)")
    own = drafter.state_dict()
    shared = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    drafter.load_state_dict(shared, strict=False)
    return sorted(set(own) - set(shared))


def draft_vocabulary(answer_token_counts: torch.Tensor, size: int) -> torch.Tensor:
    """The ``size`` most frequent target tokens in the training answers, as sorted ids; ties go to the lower id.

    >>> draft_vocabulary(torch.tensor([5, 0, 7, 5]), 2)
    tensor([0, 2])
    """
    if not 1 <= size <= len(answer_token_counts):
        raise StudyError(f"draft_vocab_size={size} must be from 1 to the target's {len(answer_token_counts)} tokens")
    return torch.argsort(answer_token_counts, descending=True, stable=True)[:size].sort().values


def _read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    if not (folder / DESCRIPTION).exists():
        raise StudyError(
            f"no trained drafter in {folder}; run notebook 02_train_drafter for that variant and seed first"
        )
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        expected, _, _ = description["weights_sha256"], description["spec"], description["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"{folder / DESCRIPTION} is damaged; delete that folder and train the drafter again"
        ) from error
    if not (folder / WEIGHTS).exists() or sha256(folder / WEIGHTS) != expected:
        raise StudyError(
            f"the weights in {folder} are missing or altered; delete that folder and train the drafter again"
        )
    try:
        return description, load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise StudyError(
            f"the weights in {folder} can't be read ({error}); delete that folder and train again"
        ) from error
