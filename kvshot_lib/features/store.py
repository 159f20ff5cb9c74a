"""Target state on disk: safetensors shards with a manifest, resumable, checked on reading, read memory-mapped."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .. import parallel
from ..errors import StudyError
from ..files import read_json, sha256, write_atomically, write_json
from .live import LiveFeatures
from .spec import STATE, Features, FeatureSpec, OfLayers, padded

MANIFEST = "manifest.json"
AGAIN = "run notebook 01_extract_kv_cache again, it makes that shard anew"


def write_store(
    folder: str | Path, live: LiveFeatures, *, batch_documents: int = 8, shard_documents: int = 32,
    dtype: torch.dtype = torch.bfloat16,
) -> dict:  # fmt: skip
    """Run the target over every document of ``live`` and keep its features in ``folder``.

    A shard holds ``shard_documents`` documents end to end, without padding: tensor ``name`` has shape [tokens, …].
    Shard i is made by process i mod P. A finished one has a record beside it (``shard-00000.json``) until the
    manifest tells of all, so a killed run goes on with the shards that have none, whatever the number of processes.

    Parameters
    ----------
    dtype : of the stored hidden states, keys and values; bfloat16 is what targets of this kind compute in.

    Returns
    -------
    The manifest.

    Raises
    ------
    StudyError : the folder holds features of another target (or the same in another number format), layer choice or
        documents; or too little space on the disk.
    """
    folder = Path(folder)
    places = range(0, len(live), shard_documents)  # first document of each shard
    paths = {first: folder / f"shard-{first // shard_documents:05d}.safetensors" for first in places}
    tokens = {first: sum(live.lengths[first : first + shard_documents]) for first in places}
    manifest = {
        "spec": asdict(live.spec), "target_dtype": str(live.target.dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."), "lengths": live.lengths, "documents_hash": live.documents_hash,
        "shard_documents": shard_documents, "shards": [], "complete": False,
    }  # fmt: skip
    if parallel.is_main():
        _take_over(folder, json.loads(json.dumps(manifest)))
        missing = sum(tokens[first] for first, path in paths.items() if not _record(path).exists())
        _check_space(folder, missing * sum(live.spec.bytes_per_token.values()) * dtype.itemsize / 2)
        write_json(folder / MANIFEST, manifest)
    parallel.wait()
    _make_shards(live, paths, tokens, batch_documents, dtype)
    parallel.wait()
    if parallel.is_main():
        shards = [read_json(_record(path), AGAIN) for path in paths.values()]
        write_json(folder / MANIFEST, manifest | {"shards": shards, "complete": True})
        for path in paths.values():
            _record(path).unlink()
    parallel.wait()
    return read_manifest(folder)


def _make_shards(
    live: LiveFeatures, paths: dict[int, Path], tokens: dict[int, int], batch_documents: int, dtype: torch.dtype
) -> None:
    """Make this process's shards that have no record; shards and their tokens go by their first document."""
    mine, firsts = parallel.share(list(paths)), [*paths, len(live)]
    undone = [first for first in mine if not _is_whole(paths[first])]
    total = sum(tokens[first] for first in mine)
    done, name = total - sum(tokens[first] for first in undone), paths[0].parent.name
    hidden = not parallel.is_main()
    with tqdm(total=total, initial=done, unit="token", desc=f"extract {name}", disable=hidden) as progress:
        for first in undone:
            documents = range(first, firsts[firsts.index(first) + 1])
            tensors = _shard(live, documents, batch_documents, dtype, progress)
            path = write_atomically(paths[first], lambda p, t=tensors: save_file(t, p))
            facts = {"documents": len(documents), "bytes": path.stat().st_size, "sha256": sha256(path)}
            write_json(_record(path), {"file": path.name, **facts})


def _take_over(folder: Path, wanted: dict) -> None:
    """Give the shards of a store of the same in ``folder`` their records back; one of something else is refused."""
    if not (folder / MANIFEST).exists():
        return
    found = read_manifest(folder)
    ours, theirs = ({**manifest, **manifest["spec"]} for manifest in (wanted, found))
    names = [name for name in ours if name not in ("spec", "shards", "complete")]
    if differs := [name for name in names if ours[name] != theirs.get(name)]:
        other = f"{folder} holds features of another set-up (differs in {', '.join(differs)})"
        raise StudyError(f"{other}; delete it or choose another results_dir")
    for shard in found["shards"]:
        write_json(_record(folder / shard["file"]), shard)


def _check_space(folder: Path, needed: float) -> None:
    """Refuse what the disk has no room for: features of so many bytes, and a little more for tokens and masks."""
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if (free := shutil.disk_usage(place).free) < 1.05 * needed:
        told = f"the features need {needed / 1e9:.3g} GB, {place} has {free / 1e9:.3g} GB free"
        raise StudyError(f"{told}; free some space or use fewer documents")


class StoredFeatures(OfLayers):
    """Features read back from a folder that :func:`write_store` made; the same interface as ``LiveFeatures``.

    Every shard's SHA-256 is compared with the manifest first.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = finished_manifest(self.folder)
        super().__init__(FeatureSpec.from_json(manifest["spec"]))
        self.lengths: list[int] = manifest["lengths"]
        self.documents_hash: str = manifest["documents_hash"]
        self._places: list[tuple[Path, int]] = []  # of each document: its shard and first row there
        for shard in manifest["shards"]:
            path, row = self.folder / shard["file"], 0
            if trouble := _trouble(path, shard):
                raise StudyError(f"{path} {trouble}; {AGAIN}")
            for length in self.lengths[len(self._places) : len(self._places) + shard["documents"]]:
                self._places.append((path, row))
                row += length
        self._open: dict[Path, object] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int], state: Sequence[str] = STATE) -> Features:
        """Read the chosen documents, right-padded with zeros; ``state`` names the fields wanted."""
        fields = {name: padded([self._rows(i, name) for i in indices]) for name in ("tokens", "answer_mask", *state)}
        fields |= {name: fields[name].long() for name in ("tokens", "target_argmax") if name in fields}
        return Features(documents=torch.tensor(list(indices)), **fields)

    def _rows(self, index: int, name: str) -> torch.Tensor:
        path, row = self._places[index]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        rows = self._open[path].get_slice(name)[row : row + self.lengths[index]]
        return rows[:, self._chosen[name]] if name in self._chosen else rows


def _shard(
    live: LiveFeatures, documents: range, batch_documents: int, dtype: torch.dtype, progress: tqdm
) -> dict[str, torch.Tensor]:
    """Features of a run of documents, end to end; documents of like length share a batch so that little is padded."""
    order = sorted(documents, key=lambda i: live.lengths[i])
    rows: dict[str, dict[int, torch.Tensor]] = {name: {} for name in ("tokens", "answer_mask", *STATE)}
    for start in range(0, len(order), batch_documents):
        indices = order[start : start + batch_documents]
        batch = live.batch(indices)
        for name, by_document in rows.items():
            tensor = getattr(batch, name)
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            for row, index in enumerate(indices):
                by_document[index] = tensor[row, : live.lengths[index]].cpu()
        progress.update(sum(live.lengths[i] for i in indices))
    flat = {name: torch.cat([by_document[i] for i in documents]) for name, by_document in rows.items()}
    flat |= {name: flat[name].int() for name in ("tokens", "target_argmax")}
    return {name: tensor.contiguous() for name, tensor in flat.items()}


def read_manifest(folder: Path) -> dict:
    """What a store says of itself."""
    remedy = "delete that folder and run notebook 01_extract_kv_cache"
    manifest = read_json(folder / MANIFEST, remedy)
    if "spec" not in manifest:
        raise StudyError(f"{folder / MANIFEST} is damaged; {remedy}")
    return manifest


def finished_manifest(folder: Path) -> dict:
    """What a whole store says of itself; one that isn't there, or not finished, is refused."""
    if not (folder / MANIFEST).exists():
        raise StudyError(f"no feature store at {folder}; run notebook 01_extract_kv_cache for this results_dir")
    if not (manifest := read_manifest(folder))["complete"]:
        raise StudyError(f"the store at {folder} is not finished; run notebook 01_extract_kv_cache again, it resumes")
    return manifest


def _record(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _is_whole(path: Path) -> bool:
    """Whether an earlier run has left this shard whole."""
    try:
        return not _trouble(path, read_json(_record(path), ""))
    except StudyError:
        return False


def _trouble(path: Path, record: dict) -> str:
    """What is wrong with a shard, by its record; empty if nothing is."""
    if not path.exists():
        return "is missing"
    if (size := path.stat().st_size) != record["bytes"]:
        return f"has {size} bytes, its manifest says {record['bytes']}"
    return "was altered: its SHA-256 is not the manifest's" if sha256(path) != record["sha256"] else ""
