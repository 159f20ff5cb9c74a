"""Trained drafters on disk: weights as safetensors, what they are as JSON beside them."""

import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import StudyError
from ..features.spec import FeatureSpec
from ..files import read_json, sha256, write_atomically, write_json
from ..target.load import Target
from .drafter import Drafter, DrafterConfig, build_drafter
from .rounding import load_rounded
from .variants import VARIANTS, in_study_order, parameters_of

WEIGHTS, DESCRIPTION = "drafter.safetensors", "drafter.json"
HUGGING_FACE = {DESCRIPTION: "config.json", WEIGHTS: "model.safetensors"}  # the same two files, as it names them


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


def find_runs(results_dir: str | Path, runs: Sequence[str] = (), finished: bool = True) -> dict[str, Path]:
    """Runs of a results folder, ``variant/seedN`` -> folder, in the study's order.

    ``runs`` names the wanted ones (all by default); ``finished`` leaves out trainings that have not run to their end.

    Raises
    ------
    StudyError : there is none, or one of ``runs`` is not there.
    """
    mark, found = "run.json" if finished else DESCRIPTION, {}
    for path in Path(results_dir).glob(f"runs/*/seed*/{mark}"):
        found[f"{path.parents[1].name}/{path.parent.name}"] = path.parent
    told, known = "finished run" if finished else "run", ", ".join(sorted(found)) or "none"
    if unknown := [name for name in runs if name not in found]:
        raise StudyError(f"{', '.join(unknown)}: no {told} in {Path(results_dir) / 'runs'}; there: {known}")
    if not found:
        raise StudyError(f"no {told} in {Path(results_dir) / 'runs'}: train one with notebooks/03_train_drafter.ipynb")
    places = {variant: place for place, variant in enumerate(in_study_order(name.split("/")[0] for name in found))}
    order = sorted(runs or found, key=lambda name: (places[name.split("/")[0]], int(name.rpartition("seed")[2])))
    return {name: found[name] for name in order}


def read_description(folder: str | Path) -> dict:
    """What a drafter's ``drafter.json`` says, its weights checked by their hash."""
    return _read(Path(folder))[0]


def save_pretrained(drafter: Drafter, folder: str | Path, **facts) -> None:
    """`save_drafter` in Hugging Face's layout: ``model.safetensors`` and ``config.json``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        save_drafter(drafter, temporary, model_type="kvshot_drafter", **facts)
        for ours, theirs in reversed(HUGGING_FACE.items()):
            os.replace(Path(temporary) / ours, folder / theirs)


def from_pretrained(folder: str | Path, target: Target) -> Drafter:
    """`load_drafter` for a folder that `save_pretrained` wrote."""
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as temporary:
        for ours, theirs in HUGGING_FACE.items():
            if (folder / theirs).exists():
                (Path(temporary) / ours).symlink_to((folder / theirs).resolve())
        described = read_json(folder / HUGGING_FACE[DESCRIPTION], "give a folder that save_pretrained wrote")
        if any("Eagle3" in name for name in described.get("architectures", [])):
            raise StudyError(f"{folder} holds an EAGLE-3 checkpoint; read it with kvshot_lib.drafters.eagle3 import")
        try:
            return load_drafter(temporary, target)
        except StudyError as error:
            raise StudyError(str(error).replace(temporary, str(folder))) from error


def warm_start(drafter: Drafter, folder: str | Path) -> list[str]:
    """Copy every weight that a trained drafter of the same target and draft vocabulary shares by name (``init_from``).

    Returns
    -------
    Names of the parameters that stay as they were.

    Raises
    ------
    StudyError : no drafter there (names the command that makes it), or another target or draft vocabulary.
    """
    draft_ids = drafter.draft_ids.cpu()
    description, tensors = _read(Path(folder), draft_vocab_size=len(draft_ids))
    theirs, ours = description["spec"], drafter.spec
    if theirs["target_hash"] != ours.target_hash:
        raise StudyError(
            f"can't start from {folder}: it was trained for target {theirs['target']} ({theirs['target_hash'][:8]}…), "
            f"not for {ours.target} ({ours.target_hash[:8]}…); train it for this target, in another results_dir"
        )
    their_ids = tensors.pop("draft_ids")
    if not torch.equal(their_ids, draft_ids):
        raise StudyError(
            f"can't start from {folder}: it drafts from another vocabulary ({_named(their_ids)}, not {_named(draft_ids)}); "
            "train both with the same draft_vocab_size and features"
        )
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


def training_command(folder: Path, **parameters) -> str:
    """The command, for the repository's root, that trains the drafter of ``results_dir/runs/<variant>/seed<k>``.

    ``results_dir`` may be absolute, or relative to the root or to notebooks/; the study's variants bring their parameters along.
    """
    results_dir, variant, seed = folder.parents[2], folder.parent.name, folder.name.removeprefix("seed")
    inside = Path(*(part for part in results_dir.parts if part != ".."))
    seen = inside if inside.is_absolute() else Path("..") / inside  # from notebooks/, where notebooks run
    output = inside / f"notebooks/03_train_drafter.{variant}.seed{seed}.ipynb"
    values = {"variant": variant, **parameters_of(variant), "seed": seed, **parameters}
    values |= {"results_dir": seen, "figures_dir": seen / "figures"}
    given = [word for name, value in values.items() for word in ("-p", name, str(value))]
    notebook = "notebooks/03_train_drafter.ipynb"
    return shlex.join(["python", "-m", "kvshot_lib.study.notebooks", "run", notebook, str(output), *given])


def _named(draft_ids: torch.Tensor) -> str:
    """Size and short hash of a draft vocabulary."""
    return f"{len(draft_ids)} tokens, {hashlib.sha256(draft_ids.numpy().tobytes()).hexdigest()[:8]}…"


def _missing(folder: Path, **parameters) -> str:
    """What to do about a drafter that isn't there."""
    if not (re.fullmatch(r"seed\d+", folder.name) and folder.parent.parent.name == "runs"):
        return f"no trained drafter in {folder}; give a folder that notebook 03_train_drafter made: .../runs/<variant>/seed<k>"
    known = "" if folder.parent.name in VARIANTS else ", what makes it this variant"
    return (
        f"no trained drafter in {folder}; train it first, from the repository's root (add your budget{known}): "
        f"{training_command(folder, **parameters)}"
    )


def _read(folder: Path, **parameters) -> tuple[dict, dict[str, torch.Tensor]]:
    """Checked description and tensors of a trained drafter; ``parameters`` are known of how one that is missing is to be trained."""
    if not (folder / DESCRIPTION).exists():
        raise StudyError(_missing(folder, **parameters))
    description = read_json(folder / DESCRIPTION, "delete that folder and train the drafter again")
    try:
        expected, _, _ = description["weights_sha256"], description["spec"], description["config"]
    except KeyError as error:
        raise StudyError(
            f"{folder / DESCRIPTION} is damaged; delete that folder and train the drafter again"
        ) from error
    if not (folder / WEIGHTS).exists() or sha256(folder / WEIGHTS) != expected:
        raise StudyError(
            f"the weights in {folder} are missing or altered; delete that folder and train the drafter again"
        )
    try:
        rounded = "rounding_step" in description  # a published drafter
        return description, (load_rounded if rounded else load_file)(folder / WEIGHTS)
    except SafetensorError as error:
        raise StudyError(
            f"the weights in {folder} can't be read ({error}); delete that folder and train again"
        ) from error
