"""A microscope for EAGLE-3 checkpoints: what one accepts on the target's own greedy answers, and why it isn't more.

    as it is         teacher-forced along the answers, as training measures it: every anchor counts
    decoding         in chains of the same length, on the same answers
    counterfactual   teacher-forced, and read as it would be if one of the usual faults were undone
    control          without the target's states, or with those of another answer
    drift            how far its state and its attention move along the draft steps (`drift`)

A change helps if the share of right drafts over all steps rises by `VISIBLE` or more, and the interval of the
difference (answers resampled, paired) is above 0. That share counts every draft of every anchor, and so sees more than
the accepted length does. The change that helps most is kept, and the others are tried again on top of it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ..drafters.context import read_by
from ..drafters.drafter import Drafter
from ..drafters.eagle3 import read_tensors
from ..drafters.eagle3_format import LAYERS
from ..errors import StudyError
from ..features.live import LiveFeatures
from ..features.resident import ResidentFeatures
from ..features.shuffled import ShuffledKV
from ..features.spec import feature_spec
from ..files import sha256
from ..metrics.resampling import Draws, Interval, draw_ratios, summary_table
from ..parts import Parts
from ..settings import at_least
from ..target.load import Target
from ..text.corpus import MIN_ANSWER_TOKENS
from ..text.prompts import Prompt
from ..training.judging import match_documents
from .answers import MAT, SHARE, Judged, accepted_drafts, answered, documents_of, outside
from .counterfactuals import Counterfactual, counterfactuals, read_with
from .drift import drift_rows

VISIBLE = 0.005
AS_IT_IS, PLAIN = "as it is", "without chat template"
ZERO, SHUFFLED = "states zeroed", "states of another answer"


@dataclass(frozen=True)
class Examination:
    """What was found.

    draws : metrics of everything measured, with paired resamples of the answers. parts : name -> its part.
    faults : the changes that help, as found. unreadable : change -> why the checkpoint can't be read so.
    base : what the other parts are of, `AS_IT_IS` if that can be read. trained_tokens : the longest text that the
    checkpoint says it is for.
    """

    draws: Draws
    parts: dict[str, str]
    faults: list[Counterfactual]
    unreadable: dict[str, str]
    base: str
    trained_tokens: int

    def of(self, name: str, metric: str = MAT, step: int | None = None) -> Interval:
        return self.draws.mean(name, metric, step)

    def gain(self, name: str, metric: str = SHARE, base: str = "") -> Interval:
        """A metric less that of another reading (by default ``base``), on the same answers."""
        return self.draws.contrast((1, name, metric), (-1, base or self.base, metric))

    @property
    def table(self) -> pd.DataFrame:
        """A row a part, variant, metric and draft step: value and 95% interval, and its gain over the checkpoint."""
        found = summary_table(self.draws).drop(columns=["seed_low", "seed_high", "seeds"])
        found.insert(0, "part", found["variant"].map(self.parts))
        whole = found["part"].isin(["counterfactual", "control", "template"]) & found["metric"].isin([SHARE, MAT])
        gains = {place: vars(self.gain(*found.loc[place, ["variant", "metric"]])) for place in found.index[whole]}
        gains = pd.DataFrame.from_dict(gains, orient="index", columns=["value", "low", "high"])
        return found.join(gains.rename(columns={"value": "gain", "low": "gain_low", "high": "gain_high"}))


class Microscope:
    """A checkpoint that is read in several ways, and judged once in each; ``changes`` make a difference to it."""

    def __init__(self, folder: Path, target: Target, fields: Mapping, draft_length: int, parts: Parts):
        self.folder, self.target, self.fields, self.parts = folder, target, fields, parts
        self.draft_length, self.tensors = draft_length, read_tensors(folder)
        self.changes, self.layers, self.unreadable = [], set(), {}
        own = self.read([])
        if fields and not own:  # what was asked for can't be
            raise StudyError(self.unreadable[AS_IT_IS])
        for one in counterfactuals(folder, target, self.tensors, fields):
            drafter = self.read([one])
            if not (own and drafter and alike(drafter, own)):
                self.changes.append(one)
            self.layers |= {*one.fields.get(LAYERS, ())}.union(
                *(read.spec.hidden_layers for read in (own, drafter) if read)
            )
        if own is None and all(one.name in self.unreadable for one in self.changes):
            raise StudyError(self.unreadable[AS_IT_IS])

    def read(self, applied: Sequence[Counterfactual]) -> Drafter | None:
        """The drafter under these changes; None, and why, if the checkpoint can't be read so."""
        try:
            return read_with(self.folder, self.target, self.tensors, applied, self.fields)
        except (StudyError, KeyError) as error:
            self.unreadable[name_of(applied)] = str(error)
            return None

    def source(self, answers: pd.DataFrame, prompt: str = "prompt") -> ResidentFeatures:
        """States of all layers that any reading needs, in memory."""
        documents, spec = documents_of(answers, prompt), feature_spec(self.target, fused_layers=sorted(self.layers))
        live = LiveFeatures(self.target, documents, spec, max(len(document.tokens) for document in documents))
        return ResidentFeatures(live, self.target.device, ("hidden_states", "target_argmax"), batch_documents=4)

    def judge(self, drafter: Drafter, name: str, source) -> Judged:
        """Its drafts, teacher-forced: made, or as they are kept under this name."""
        own = read_by(drafter.config, drafter.spec, source)
        own = ShuffledKV(own, ("hidden_states",)) if name == SHUFFLED else own

        def make() -> pd.DataFrame:
            found = match_documents(own, drafter, self.draft_length, device=self.target.device)
            return pd.DataFrame({"match": [m.ravel() for m, _ in found], "valid": [v.ravel() for _, v in found]})

        kept = self.parts.table(name.replace("/", " "), make).itertuples(index=False)
        return Judged([tuple(part.astype(bool).reshape(-1, self.draft_length) for part in row) for row in kept])

    def search(self, source, rounds: int) -> tuple[dict[str, Judged], list[Counterfactual]]:
        """Every change judged, alone and on top of those that help; and these."""
        judged, faults, best = {}, [], None
        if drafter := self.read([]):
            judged[best := AS_IT_IS] = self.judge(drafter, AS_IT_IS, source)
        for _ in range(rounds):
            tried, set_already = {}, {name for one in faults for name in one.fields}
            for one in tqdm(self.changes, desc="changes", mininterval=1):
                name = name_of(applied := [*faults, one])
                if one not in faults and not set_already & {*one.fields} and (drafter := self.read(applied)):
                    judged[name], tried[name] = self.judge(drafter, name, source), one
            drawn = draws_of(row for name in (best, *tried) if name for row in judged[name].rows(name))
            first = max(tried, key=lambda name: drawn.mean(name, SHARE).value, default=None)
            if first is None or (best and not helps(drawn.contrast((1, first, SHARE), (-1, best, SHARE)))):
                break
            faults.append(tried[first])
            best = first
        return judged, faults


def examine(
    folder: str | Path, target: Target, prompts: Sequence[Prompt], *, kept: str | Path, draft_length: int = 7,
    new_tokens: int = 96, rounds: int = 2, fields: Mapping | None = None, fingerprint: str = "",
) -> Examination:  # fmt: skip
    """Measure a checkpoint in EAGLE-3's form on the target's answers to some prompts, and look for what is wrong.

    Parameters
    ----------
    kept : folder of finished parts: the same call goes on with them, and the answers serve other checkpoints too.
    draft_length, new_tokens : draft steps, and the longest answer. rounds : faults that are looked for, one by one.
    fields : of its ``config.json``, taken instead. fingerprint : of the code that makes the parts.

    Raises
    ------
    StudyError : a checkpoint that can't be read under any change, with what is wrong as it is; no usable answer.
    """
    at_least(1, draft_length=draft_length, new_tokens=new_tokens, rounds=rounds)
    folder, fields, kept = Path(folder), dict(fields or {}), Path(kept)
    files = [(path.name, sha256(path)) for path in sorted(folder.glob("*")) if path.is_file()]
    common = (fingerprint, target.hash, [*prompts], new_tokens)
    parts = parts_of(kept, folder.name, common, draft_length, fields, files)
    scope = Microscope(folder, target, fields, draft_length, parts)
    answers = answers_of(target, prompts, new_tokens, parts_of(kept, "answers", common))
    source = scope.source(answers)
    judged, faults = scope.search(source, rounds)
    applied = faults if AS_IT_IS in scope.unreadable else []
    drafter, base = scope.read(applied), name_of(applied)
    own, rows = judged[base], [row for name, one in judged.items() for row in one.rows(name)]
    told = dict.fromkeys(judged, "counterfactual") | {base: AS_IT_IS}

    def add(part: str, name: str, more: Iterable[dict]) -> None:
        told[name] = part
        rows.extend(more)

    zero = Counterfactual(ZERO, "", change=lambda own: {**own, "fc.weight": torch.zeros_like(own["fc.weight"])})
    for part, name, read, features in (
        ("control", ZERO, scope.read([*applied, zero]), source),
        ("control", SHUFFLED, drafter, source),
        ("template", PLAIN, drafter, scope.source(answers, "plain")),
    ):
        add(part, name, scope.judge(read, name, features).rows(name))
    trained = drafter.sizes.max_position_embeddings
    groups = {"context": own.by_context(answers, trained), "category": own.by_category(answers["category"])}
    for part, chosen in groups.items():
        for name, anchors in chosen.items():
            add(part, name, own.rows(name, anchors))
    rows += outside(answers, drafter, base)
    moved = partial(drift_rows, target, drafter, read_by(drafter.config, drafter.spec, source), draft_length)
    for row in parts.table(f"drift {base}".replace("/", " "), lambda: pd.DataFrame(moved())).to_dict("records"):
        add("drift", row["variant"], [row])
    rounds_of = {}
    for row in tqdm(answers.itertuples(), "decode", len(answers), unit="answer", mininterval=1):
        make = partial(accepted_drafts, target, drafter, row, draft_length)
        rounds_of[row.Index] = parts.table(f"decoded {row.Index}", make)["accepted"].tolist()
    for row in own.decoded(rounds_of):
        add("decoding", row["variant"], [row])
    return Examination(draws_of(rows), told, faults, scope.unreadable, base, trained)


def answers_of(target: Target, prompts: Sequence[Prompt], new_tokens: int, parts: Parts) -> pd.DataFrame:
    """The target's answers to the prompts, a row each; those of a few tokens are left out."""
    found = []
    for number, prompt in enumerate(tqdm(prompts, desc="answers", unit="prompt", mininterval=1)):
        found.append(parts.table(f"{number}", partial(answered, target, prompt, new_tokens)))
    found = [own for own in found if len(own["answer"].iloc[0]) >= MIN_ANSWER_TOKENS]
    if not found:
        raise StudyError(f"no answer of {MIN_ANSWER_TOKENS} tokens or more; give other prompts, or more new tokens")
    return pd.concat(found, ignore_index=True)


def parts_of(kept: Path, name: str, *depends: object) -> Parts:
    """Finished parts of what depends on this, in a folder of their own."""
    digest = hashlib.sha256(repr(depends).encode()).hexdigest()
    return Parts(kept / f"{name}-{digest[:8]}", digest)


def alike(one: Drafter, other: Drafter) -> bool:
    """Whether two readings of a checkpoint draft the same."""
    tensors = [{**dict(own.named_buffers()), **own.state_dict()} for own in (one, other)]
    same = (one.config, one.spec) == (other.config, other.spec) and tensors[0].keys() == tensors[1].keys()
    return same and all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def name_of(applied: Sequence[Counterfactual]) -> str:
    """How a reading is called: after its changes."""
    return " + ".join(one.name for one in applied) or AS_IT_IS


def draws_of(rows: Iterable[dict]) -> Draws:
    """Ratios of sums over answers, with 2,000 resamples of these."""
    drawn = draw_ratios(pd.DataFrame(rows), ["metric", "draft_step"])
    drawn.keys["draft_step"] = drawn.keys["draft_step"].astype("Int64")
    return drawn


def helps(gain: Interval) -> bool:
    """Whether a change of the share of right drafts is visible."""
    return gain.value >= VISIBLE and gain.low > 0
