"""What tells one drafter from another, and which choices contradict one another."""

from dataclasses import dataclass, fields

from ..errors import StudyError

CHOICES = {
    "paradigm": ("hidden", "kv", "hybrid", "block"),
    "feedback": ("pre_norm", "post_norm"),
    "kv_fusion": ("linear", "heads", "mlp"),
    "kv_rope": ("raw", "unrotate"),
    "kv_control": ("", "none", "zero", "shuffled", "lagged", "from_hidden"),
    "kv_init": ("random", "target"),
    "block_context": ("kv", "hidden", "both"),
}
# Which parameters mean something to which paradigm; elsewhere they must keep their default.
READS = {
    "hidden": ("feedback", "hidden_norm"),
    "kv": (
        "num_layers",
        "kv_layers",
        "kv_fusion",
        "kv_rope",
        "kv_control",
        "kv_with_hidden",
        "kv_lag_tokens",
        "kv_grad_scale",
        "kv_init",
    ),
    "hybrid": (
        "feedback",
        "hidden_norm",
        "kv_layers",
        "kv_fusion",
        "kv_rope",
        "kv_grad_scale",
        "kv_init",
        "cross_only",
        "gate_bias",
        "gate_floor",
    ),
    "block": (
        "num_layers",
        "block_context",
        "block_size",
        "hidden_norm",
        "kv_layers",
        "kv_fusion",
        "kv_rope",
        "kv_init",
    ),
}


@dataclass(frozen=True)
class DrafterConfig:
    """Everything that tells one drafter from another; sizes come from the target.

    paradigm : ``hidden``, ``kv``, ``hybrid`` or ``block``.
    num_layers : decoder layers; 1 for ``hidden`` and ``hybrid``.
    kv_layers : how many uniformly spaced target layers have their KV reused.
    kv_fusion : how their KV become one drafter layer's: ``linear`` (end to end, one linear map), ``mlp`` (two, with SiLU
        between them) or ``heads`` (as they are, side by side as KV heads).
    kv_rope : map keys as cached (``raw``), or undo their RoPE, map them, and rotate again (``unrotate``).
    kv_control : what stands in for the target's KV: nothing but the drafter's own prefix (``none``), zeros, another document's
        KV (``shuffled``), KV older by ``kv_lag_tokens`` (``lagged``), or keys and values made from hidden states (``from_hidden``).
    kv_with_hidden : add to keys and values made from the target's KV those made from its hidden states: one entry of both a position.
    kv_grad_scale : multiplies the gradient of the draft-side key and value projections.
    kv_init : how the draft-side key and value projections start: ``random``, or from the ``target``'s own (`kv_init`).
    cross_only : a hybrid without its self-attention branch.
    feedback : what ``hidden`` and ``hybrid`` feed back as state: ``pre_norm`` (EAGLE-3) or ``post_norm`` (EAGLE-3.1).
    hidden_norm : norm each target hidden state before they are fused (EAGLE-3 doesn't; a few of their channels are huge).
    gate_bias : initial bias of the hybrid's gate; the gate starts near sigmoid(gate_bias).
    gate_floor : least value of the gate, which is gate_floor + (1 - gate_floor) · sigmoid(…): the branch can't be shut off.
    block_context : what of the target a block sees: its ``kv``, its ``hidden`` states, or ``both``.
    block_size : slots of a block, the known token included: it drafts one token fewer.

    Raises
    ------
    StudyError : an unknown choice, or parameters that contradict one another.
    """

    paradigm: str = "hidden"
    num_layers: int = 1
    kv_layers: int = 3
    kv_fusion: str = "linear"
    kv_rope: str = "raw"
    kv_control: str = ""
    kv_with_hidden: bool = False
    kv_lag_tokens: int = 4
    kv_grad_scale: float = 1.0
    cross_only: bool = False
    feedback: str = "pre_norm"
    hidden_norm: bool = False
    gate_bias: float = 0.0
    gate_floor: float = 0.0
    kv_init: str = "random"
    block_context: str = "kv"
    block_size: int = 8

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(repr(choice) for choice in allowed)
                raise StudyError(f"{name}={getattr(self, name)!r} is not known; choose from {known}")
        for name in ("num_layers", "kv_layers", "kv_lag_tokens", "kv_grad_scale"):
            if not getattr(self, name) > 0:
                raise StudyError(f"{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.gate_floor < 1:
            raise StudyError(f"gate_floor={self.gate_floor} must be 0 or more and below 1")
        if self.block_size < 2:
            raise StudyError(f"block_size={self.block_size} must be 2 or more: slot 0 holds a known token")
        for field in fields(self):
            meant = field.name == "paradigm" or field.name in READS[self.paradigm]
            if not meant and getattr(self, field.name) != field.default:
                raise StudyError(
                    f"{field.name}={getattr(self, field.name)!r} means nothing to a {self.paradigm} drafter; "
                    f"it takes {', '.join(READS[self.paradigm])}"
                )
        if self.paradigm == "block" and self.block_context == "kv" and self.hidden_norm:
            raise StudyError(
                "hidden_norm=True contradicts block_context='kv', which reads no hidden states; take 'both'"
            )
        for name, value, other, allowed in self._contradictions():
            if getattr(self, name) == value and getattr(self, other) not in allowed:
                raise StudyError(
                    f"{name}={value!r} contradicts {other}={getattr(self, other)!r}; with it, {other} must be "
                    f"{' or '.join(repr(choice) for choice in allowed)}"
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

    @staticmethod
    def _contradictions() -> list[tuple]:
        """(parameter, its value, another parameter, what that one must be then)."""
        linear_only = [("kv_control", c, o, (v,)) for c in ("none", "from_hidden") for o, v in _PLAIN]
        return [
            *linear_only,
            ("kv_control", "none", "num_layers", (1,)),
            ("kv_control", "none", "kv_grad_scale", (1.0,)),
            ("kv_fusion", "heads", "kv_rope", ("raw",)),
            ("kv_with_hidden", True, "kv_fusion", ("linear", "mlp")),
            ("kv_with_hidden", True, "kv_control", ("",)),
            ("cross_only", True, "gate_bias", (0.0,)),
            ("cross_only", True, "gate_floor", (0.0,)),
            ("kv_init", "target", "kv_control", ("", "shuffled", "lagged")),
            ("kv_init", "target", "kv_fusion", ("linear", "heads")),
            *[("block_context", "hidden", o, (v,)) for o, v in (("kv_init", "random"), ("kv_layers", 3), *_PLAIN)],
            *[("kv_control", c, "kv_lag_tokens", (4,)) for c in CHOICES["kv_control"] if c != "lagged"],
        ]


_PLAIN = (("kv_fusion", "linear"), ("kv_rope", "raw"))
