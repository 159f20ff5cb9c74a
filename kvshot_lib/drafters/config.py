"""What tells one drafter from another, and which choices contradict one another."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from ..errors import StudyError
from ..settings import check_settings

# Which parameters mean something to which paradigm; elsewhere they must keep their default.
_CACHE = ("kv_layers", "kv_fusion", "kv_rope", "kv_norm", "kv_init")
_EVERY = ("norm_init", "window_tokens")
READS = {
    "hidden": ("num_layers", "feedback", "hidden_norm", "state_layers", "kv_layers", "qk_norm", *_EVERY),
    "kv": (
        "num_layers", *_CACHE, "kv_control", "kv_with_hidden", "kv_lag_tokens", "kv_grad_scale", "state_layers",
        "state_gains", "qk_norm", "query_from", *_EVERY,
    ),
    "hybrid": (
        "feedback", "hidden_norm", *_CACHE, "kv_grad_scale", "state_layers", "cross_only", "gate_bias", "gate_floor",
        *_EVERY,
    ),
    "block": ("num_layers", "block_context", "block_size", "hidden_norm", *_CACHE, "state_layers", *_EVERY),
}  # fmt: skip
_PLAIN = {"kv_fusion": ("linear",), "kv_rope": ("raw",), "kv_norm": (False,)}
# A parameter, some of its values, and what others may be then.
_RULES = (
    ("kv_control", ("none", "from_hidden"), _PLAIN),
    ("kv_control", ("none",), {"kv_grad_scale": (1.0,)}),
    ("kv_control", ("", "none", "zero", "shuffled", "from_hidden"), {"kv_lag_tokens": (4,)}),
    ("kv_fusion", ("heads",), {"kv_rope": ("raw",), "kv_norm": (False,)}),
    ("kv_with_hidden", (True,), {"kv_fusion": ("linear", "mlp"), "kv_control": ("",), "qk_norm": (False,)}),
    ("kv_init", ("target",), {"kv_control": ("", "shuffled", "lagged"), "kv_fusion": ("linear", "heads")}),
    ("kv_init", ("target",), {"kv_norm": (False,)}),
    ("query_from", ("target", "anchor"), {"state_layers": ("kv",)}),
    ("query_from", ("target", "anchor", "constant"), {"kv_control": ("", "zero", "shuffled", "lagged", "from_hidden")}),
    ("cross_only", (True,), {"gate_bias": (0.0,), "gate_floor": (0.0,)}),
    ("block_context", ("hidden",), {"kv_init": ("random",), **_PLAIN}),
)
_POSITIVE = ("num_layers", "kv_layers", "kv_lag_tokens", "kv_grad_scale")


@dataclass(frozen=True)
class DrafterConfig:
    """Everything that tells one drafter from another; sizes come from the target.

    paradigm : ``hidden``, ``kv``, ``hybrid`` or ``block``.
    num_layers : decoder layers; 1 for ``hybrid``. ``hidden``'s later ones read the stream alone.
    kv_layers : how many uniformly spaced target layers have their KV reused, or a list of them; with
        ``state_layers="kv"`` also whose inputs are read.
    kv_fusion : how their KV become one drafter layer's: ``linear`` (end to end, one linear map), ``mlp``
        (two, with SiLU between them) or ``heads`` (as they are, side by side as KV heads; of one layer:
        the target's own cache).
    kv_rope : map keys as cached (``raw``), or undo their RoPE, map them, and rotate again (``unrotate``).
    kv_norm : norm each layer's keys and values at each position before they are mapped.
    kv_control : what stands in for the target's KV: nothing but the drafter's own prefix (``none``),
        zeros, another document's KV (``shuffled``), KV older by ``kv_lag_tokens`` (``lagged``), or
        entries made from hidden states (``from_hidden``).
    kv_with_hidden : add to entries made from the target's KV those made from its hidden states.
    kv_grad_scale : multiplies the gradient of the draft-side key and value projections.
    kv_init : how these start: ``random``, or from the ``target``'s own (`context.start_from_target`).
    state_layers : whose inputs the hidden states are: EAGLE's three (``eagle``), or the layers whose KV
        is reused (``kv``).
    state_gains : of the norm that hidden states pass on their way to entries, at the start: ``ones``, shared by all
        layers, or each layer's own, as its attention reads it (``target``). Gemma's states are all but constant else.
    qk_norm : norm the queries and keys of the drafter's attention per head, before RoPE.
    query_from : what queries at t+1+k are made from: the drafter's ``own`` input; the ``target``'s inputs of the read
        layers there (its true queries are maps of them; no drafter knows them); these at the ``anchor`` t, which a
        drafter may know, and the token; or nothing (``constant``). All but the first are teacher-forced only.
    norm_init : gains of the final norm at the start: the ``target``'s; or ``unit``, divided so that random inputs of
        variance 1 give logits of variance 1, and a fresh drafter's loss is near ln V_draft (on Gemma it is hundreds).
        Where the normed state is fed back they would act again at every step; there they start all alike.
    window_tokens : an anchor sees the newest of its prefix entries, so many in each layer; 0 for all.
    cross_only : a hybrid without its self-attention branch.
    feedback : what ``hidden`` and ``hybrid`` feed back as state: ``pre_norm`` (EAGLE-3) or ``post_norm``
        (EAGLE-3.1).
    hidden_norm : norm each target hidden state before fusing them (EAGLE-3 doesn't; some channels are huge).
    gate_bias : initial bias of the hybrid's gate; the gate starts near sigmoid(gate_bias).
    gate_floor : least value of the gate, which is gate_floor + (1 - gate_floor) · sigmoid(…).
    block_context : what of the target a block sees: its ``kv``, its ``hidden`` states, or ``both``.
    block_size : slots of a block, the known token included: it drafts one token fewer.

    Raises
    ------
    StudyError : a value of another type or out of range, or parameters that contradict one another.
    """

    paradigm: Literal["hidden", "kv", "hybrid", "block"] = "hidden"
    num_layers: int = 1
    kv_layers: int | tuple[int, ...] = 3
    kv_fusion: Literal["linear", "heads", "mlp"] = "linear"
    kv_rope: Literal["raw", "unrotate"] = "raw"
    kv_control: Literal["", "none", "zero", "shuffled", "lagged", "from_hidden"] = ""
    kv_with_hidden: bool = False
    kv_lag_tokens: int = 4
    kv_grad_scale: float = 1.0
    cross_only: bool = False
    feedback: Literal["pre_norm", "post_norm"] = "pre_norm"
    hidden_norm: bool = False
    gate_bias: float = 0.0
    gate_floor: float = 0.0
    kv_init: Literal["random", "target"] = "random"
    block_context: Literal["kv", "hidden", "both"] = "kv"
    block_size: int = 8
    kv_norm: bool = False
    state_layers: Literal["eagle", "kv"] = "eagle"
    state_gains: Literal["ones", "target"] = "ones"
    qk_norm: bool = False
    query_from: Literal["own", "target", "anchor", "constant"] = "own"
    window_tokens: int = 0
    norm_init: Literal["target", "unit"] = "target"

    @classmethod
    def of(cls, values: Mapping) -> "DrafterConfig":
        """From parameters of the training notebook; what else ``values`` hold is left alone."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def __post_init__(self) -> None:
        if isinstance(self.kv_layers, list):  # from JSON or a profile
            object.__setattr__(self, "kv_layers", tuple(self.kv_layers))
        check_settings(self)
        self._check_ranges()
        self._check_meaning()
        for name, values, others in _RULES:
            value = getattr(self, name)
            for other, allowed in others.items() if value in values else ():
                if getattr(self, other) not in allowed:
                    raise StudyError(
                        f"{name}={value!r} contradicts {other}={getattr(self, other)!r}; with it, {other} must be "
                        f"{' or '.join(map(repr, allowed))}"
                    )

    @property
    def reads_kv(self) -> bool:
        """Whether it reads keys and values of target layers."""
        if self.paradigm == "block":
            return self.block_context != "hidden"
        return self.paradigm != "hidden" and self.kv_control not in ("none", "from_hidden")

    @property
    def fuses_hidden(self) -> bool:
        """Whether it fuses the target's hidden states into one."""
        return self.paradigm in ("hidden", "hybrid") or (self.paradigm == "block" and self.block_context != "kv")

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of `Features` that its prefix is made from."""
        states = self.fuses_hidden or self.kv_with_hidden or self.kv_control == "from_hidden"
        states = states or self.query_from in ("target", "anchor")
        return ("hidden_states",) * states + ("keys", "values") * self.reads_kv

    def _check_ranges(self) -> None:
        """Each parameter on its own."""
        named = self.kv_layers if isinstance(self.kv_layers, tuple) else ()
        if min(named, default=0) < 0 or len({*named}) < len(named):
            raise StudyError(f"kv_layers={named} must name each target layer once, counted from 0")
        for name in _POSITIVE:
            value = getattr(self, name)
            if not (value if isinstance(value, tuple) else value > 0):
                raise StudyError(f"{name}={value} must be above 0")
        if self.window_tokens < 0:
            raise StudyError(f"window_tokens={self.window_tokens} must be 0 (no window) or more")
        if not 0 <= self.gate_floor < 1:
            raise StudyError(f"gate_floor={self.gate_floor} must be 0 or more and below 1")
        if self.block_size < 2:
            raise StudyError(f"block_size={self.block_size} must be 2 or more: slot 0 holds a known token")

    def _check_meaning(self) -> None:
        """Nothing is set that means nothing to this drafter."""
        for field in fields(self):
            meant = field.name == "paradigm" or field.name in READS[self.paradigm]
            if not meant and getattr(self, field.name) != field.default:
                raise StudyError(
                    f"{field.name}={getattr(self, field.name)!r} means nothing to a {self.paradigm} drafter; "
                    f"it takes {', '.join(READS[self.paradigm])}"
                )
        if self.state_gains != "ones" and not (self.kv_with_hidden or self.kv_control == "from_hidden"):
            raise StudyError(f"state_gains={self.state_gains!r} means nothing without entries from hidden states")
        for name in ("hidden_norm", "state_layers"):
            value = getattr(self, name)
            if value != self.__dataclass_fields__[name].default and "hidden_states" not in self.reads:
                raise StudyError(f"{name}={value!r} means nothing without hidden states to read; leave it out")
        chosen = self.reads_kv or self.state_layers == "kv"
        if self.kv_layers != 3 and self.paradigm in ("hidden", "block") and not chosen:
            told = f"kv_layers={self.kv_layers!r} means nothing to a {self.paradigm} drafter over EAGLE's layers"
            raise StudyError(f"{told}; set state_layers='kv', or leave it out")
        if self.qk_norm and self.reads_kv and self.kv_rope == "raw":
            raise StudyError("qk_norm=True norms keys before RoPE, cached keys have theirs: set kv_rope='unrotate'")
