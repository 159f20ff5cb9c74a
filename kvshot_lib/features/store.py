"""Target state on disk: safetensors shards with a manifest, resumable, checked on reading, read memory-mapped."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .. import parallel
from ..errors import StudyError
from ..files import read_json, sha256, write_atomically, write_json
from ..text.corpus import Document
from .live import LiveFeatures
from .spec import STATE, Features, FeatureSpec, pad_documents

SCHEMA = 1
MANIFEST = "manifest.json"


def write_store(
    folder: str | Path, live: LiveFeatures, *, batch_documents: int = 8, shard_documents: int = 32,
    dtype: torch.dtype = torch.bfloat16, replace: bool = False,
) -> dict:  # fmt: skip
    """Run the target over every document of ``live`` and keep its features in ``folder``.

    A shard holds ``shard_documents`` documents end to end, without padding: tensor ``name`` has shape [tokens, …]. Each shard
    and then the manifest is written atomically, so a killed run goes on after the last whole shard.

    Parameters
    ----------
    dtype : of the stored hidden states, keys and values; bfloat16 is what targets of this kind compute in.
    replace : start anew if the folder holds features of something else, instead of refusing.

    Returns
    -------
    The manifest.

    Raises
    ------
    StudyError : the folder holds features of another target (or the same in another number format), layer choice or documents; or too
        little disk space.
    """
    folder = Path(folder)
    manifest = {
        "schema": SCHEMA, "spec": asdict(live.spec), "target_dtype": str(live.target.dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."), "lengths": live.lengths,
        "documents_hash": live.documents_hash, "shard_documents": shard_documents, "shards": [], "complete": False,
    }  # fmt: skip
    manifest = json.loads(json.dumps(manifest))
    if (folder / MANIFEST).exists() and parallel.is_main():
        manifest = _resume(folder, manifest, replace)
    if parallel.count() > 1:
        return write_shares(folder, live, manifest, batch_documents, dtype)
    needed = sum(live.lengths[_done(manifest) :]) * sum(live.spec.bytes_per_token.values())
    _check_space(folder, needed * dtype.itemsize // 2)
    with tqdm(
        total=sum(live.lengths),
        initial=sum(live.lengths[: _done(manifest)]),
        unit="token",
        desc=f"extract {folder.name}",
    ) as bar:
        for first in range(_done(manifest), len(live), shard_documents):
            last = min(first + shard_documents, len(live))
            path = folder / f"shard-{first // shard_documents:05d}.safetensors"
            tensors = _shard(live, range(first, last), batch_documents, dtype, bar)
            write_atomically(path, lambda p, t=tensors: save_file(t, p))
            manifest["shards"].append(_shard_facts(path, last - first))
            write_json(folder / MANIFEST, manifest)
    manifest["complete"] = True
    write_json(folder / MANIFEST, manifest)
    return manifest


def write_shares(folder: Path, live: LiveFeatures, manifest: dict, batch_documents: int, dtype: torch.dtype) -> dict:
    """The same store from several processes: shard i is made by process i mod P, with a record beside it; the first writes one manifest.

    A killed run goes on, with any number of processes, after the shards that have a record.
    """
    if parallel.is_main():
        write_json(folder / MANIFEST, manifest | {"complete": False})
    parallel.wait()
    manifest, size = _read_manifest(folder), manifest["shard_documents"]
    paths = {
        first: folder / f"shard-{first // size:05d}.safetensors" for first in range(_done(manifest), len(live), size)
    }
    mine = parallel.share(list(paths))
    lengths = [sum(live.lengths[first : first + size]) for first in mine]
    _check_space(
        folder, sum(lengths) * parallel.count() * sum(live.spec.bytes_per_token.values()) * dtype.itemsize // 2
    )
    with tqdm(total=sum(lengths), unit="token", desc=f"extract {folder.name}", disable=not parallel.is_main()) as bar:
        for first in mine:
            documents, record = range(first, min(first + size, len(live))), paths[first].with_suffix(".json")
            if not _recorded(paths[first], record):
                tensors = _shard(live, documents, batch_documents, dtype, bar)
                write_atomically(paths[first], lambda p, t=tensors: save_file(t, p))
                write_json(record, _shard_facts(paths[first], len(documents)))
    parallel.wait()
    if parallel.is_main():
        records = [path.with_suffix(".json") for path in paths.values()]
        manifest["shards"] += [json.loads(record.read_text()) for record in records]
        write_json(folder / MANIFEST, manifest | {"complete": True})
        for record in records:
            record.unlink()
    parallel.wait()
    return _read_manifest(folder)


def _shard_facts(path: Path, documents: int) -> dict:
    """What the manifest says of a shard."""
    return {"file": path.name, "documents": documents, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _recorded(path: Path, record: Path) -> bool:
    """Whether an earlier run has left this shard whole."""
    try:
        _check_shard(path, json.loads(record.read_text()), verify=True)
        return True
    except (OSError, ValueError, KeyError, StudyError):
        return False


class StoredFeatures:
    """Features read back from a folder that :func:`write_store` made; the same interface as ``LiveFeatures``.

    Parameters
    ----------
    expect : refuse a store of another target or layer choice.
    verify : compare every shard's size and SHA-256 with the manifest first.
    """

    def __init__(self, folder: str | Path, *, expect: FeatureSpec | None = None, verify: bool = True):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise StudyError(
                f"no feature store at {self.folder}; run notebook 01_extract_kv_cache with the same results_dir"
            )
        manifest = _read_manifest(self.folder)
        if not manifest["complete"]:
            raise StudyError(
                f"the feature store at {self.folder} is not finished; run notebook 01_extract_kv_cache again, it resumes"
            )
        self.spec = FeatureSpec.from_json(manifest["spec"])
        if expect is not None and (differs := _differences(asdict(expect), asdict(self.spec))):
            raise StudyError(
                f"the feature store at {self.folder} was made with another {differs}; run notebook 01_extract_kv_cache anew"
            )
        self.lengths: list[int] = manifest["lengths"]
        self.documents_hash: str = manifest["documents_hash"]
        self._places: list[tuple[Path, int]] = []  # of each document: its shard and first row there
        for shard in manifest["shards"]:
            _check_shard(self.folder / shard["file"], shard, verify)
            row = 0
            for length in self.lengths[len(self._places) : len(self._places) + shard["documents"]]:
                self._places.append((self.folder / shard["file"], row))
                row += length
        self._open: dict[Path, object] = {}
        self._kv_places: list[int] | None = None  # which stored layers keys and values are read of; None: all

    def with_kv_layers(self, layers: Sequence[int]) -> "StoredFeatures":
        """The same store, with keys and values of some of its target layers only."""
        if missing := [layer for layer in layers if layer not in self.spec.kv_layers]:
            raise StudyError(
                f"{self.folder} holds no keys and values of target layers {missing}, only of {list(self.spec.kv_layers)}; "
                f"run notebook 01_extract_kv_cache with kv_layers={sorted({*self.spec.kv_layers, *layers})}"
            )
        view = copy.copy(self)
        view._kv_places = [self.spec.kv_layers.index(layer) for layer in layers]
        view.spec = dataclasses.replace(self.spec, kv_layers=tuple(layers))
        return view

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int], state: Sequence[str] = STATE) -> Features:
        """Read the chosen documents, right-padded with zeros; ``state`` names the fields wanted (the rest stay None)."""
        plain = pad_documents(
            [Document(self._read(i, "tokens").numpy(), self._read(i, "answer_mask").bool().numpy()) for i in indices],
            range(len(indices)),
        )
        longest, padded = plain.tokens.shape[1], {}
        for name in state:
            rows = [self._read(i, name) for i in indices]
            tensor = rows[0].new_zeros(len(rows), longest, *rows[0].shape[1:])
            for target, row in zip(tensor, rows, strict=True):
                target[: len(row)] = row
            padded[name] = tensor.long() if name == "target_argmax" else tensor
        return Features(plain.tokens, plain.answer_mask, torch.tensor(list(indices)), **padded)

    def _read(self, index: int, name: str) -> torch.Tensor:
        path, row = self._places[index]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        rows = self._open[path].get_slice(name)[row : row + self.lengths[index]]
        return rows[:, self._kv_places] if self._kv_places is not None and name in ("keys", "values") else rows


def _shard(
    live: LiveFeatures, documents: range, batch_documents: int, dtype: torch.dtype, bar: tqdm
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
        bar.update(sum(live.lengths[i] for i in indices))
    flat = {name: torch.cat([by_document[i] for i in documents]) for name, by_document in rows.items()}
    flat |= {name: flat[name].int() for name in ("tokens", "target_argmax")}
    return {name: tensor.contiguous() for name, tensor in flat.items()}


def _done(manifest: dict) -> int:
    return sum(shard["documents"] for shard in manifest["shards"])


def _read_manifest(folder: Path) -> dict:
    remedy = "delete that folder and run notebook 01_extract_kv_cache"
    try:
        manifest = read_json(folder / MANIFEST, remedy)
        if manifest["schema"] != SCHEMA:
            raise StudyError(
                f"the feature store at {folder} has schema {manifest['schema']}, this code reads {SCHEMA}; run notebook 01_extract_kv_cache anew"
            )
        return manifest
    except KeyError as error:
        raise StudyError(f"{folder / MANIFEST} is damaged; {remedy}") from error


def _resume(folder: Path, wanted: dict, replace: bool) -> dict:
    """The manifest to go on from: the one on disk with its whole shards, or ``wanted`` from the start."""
    found = _read_manifest(folder)
    if differs := _differences({k: wanted[k] for k in wanted if k not in ("shards", "complete")}, found):
        if not replace:
            raise StudyError(
                f"{folder} holds features made with another {differs}; delete it, or set replace_store=True, or choose another results_dir"
            )
        shutil.rmtree(folder)
        return wanted
    for number, shard in enumerate(found["shards"]):
        try:
            _check_shard(folder / shard["file"], shard, verify=True)
        except StudyError:  # extract from the damaged shard on
            found["shards"], found["complete"] = found["shards"][:number], False
            break
    return found


def _differences(wanted: dict, found: dict) -> str:
    names = [name for name in wanted if wanted[name] != found.get(name)]
    if names == ["spec"]:
        return _differences(wanted["spec"], found["spec"])
    return ", ".join(names)


def _check_shard(path: Path, record: dict, verify: bool) -> None:
    advice = "run notebook 01_extract_kv_cache again, it makes that shard anew"
    if not path.exists():
        raise StudyError(f"{path} is missing; {advice}")
    if (size := path.stat().st_size) != record["bytes"]:
        raise StudyError(f"{path} has {size} bytes, its manifest says {record['bytes']}; {advice}")
    if verify and sha256(path) != record["sha256"]:
        raise StudyError(f"{path} was altered: its SHA-256 is not the manifest's; {advice}")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise StudyError(f"{path} is not a readable safetensors file ({error}); {advice}") from error


def _check_space(folder: Path, needed_bytes: int) -> None:
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if (free := shutil.disk_usage(existing).free) < needed_bytes * 1.05:
        raise StudyError(
            f"the features need {needed_bytes / 1e9:.3g} GB, {existing} has {free / 1e9:.3g} GB free; free some space or use fewer documents"
        )
