"""What of the prefix can be read back: token x_{t-j} from the fused hidden states at t, and from the KV cache through one learned query.

    python -m kvshot_lib.probes.readout RESULTS_DIR [--steps N]

Two probes, trained on the training documents and scored on the evaluation documents, for distances j = 1 … 64:

    hidden   logits_j = E A_j f_t + b       f_t: the fused layers' states at t, each channel standardised
    kv       logits_j = E A_j r_j + b       r_j = Σ_{s ≤ t} softmax_s(q_j · k_s / sqrt(D)) v_s: one attention head over the reused layers' keys and
                                            values end to end (values standardised), its query q_j the same at every t but for RoPE

E are the target's own token embeddings (rows made equal in length; frozen) of the ``VOCABULARY`` most frequent training tokens, b their log-frequency, A_j learned,
zero at first: a probe that learns nothing stays at the unigram floor. Cached keys carry RoPE, so q_j is turned to position t as the target's queries are, and
q_j · k_s depends on t - s and on what is in the key. It starts at the mean un-rotated key turned back by j: at "distance j", if keys were alike.

Positions t are answer tokens at t ≥ 64 whose x_{t-j} is among those tokens. Every training position is drawn at random, few more often than once.

What it can't show: the kv probe's query is constant, a drafter's depends on the text; a better probe may read more from either; f_t is
one vector, while a `hidden` drafter also attends to f_s of earlier positions; and what can be read is not what drafting needs.

Writes `recoverable.parquet` (a row for each source, distance and document: positions, correct, sum of cross-entropies) and `recoverable_facts.csv`.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..drafters.layers import rotated
from ..errors import StudyError, one_line_errors
from ..features.kept import open_features, read_spec
from ..files import write_csv
from ..metrics import tables
from ..parts import claim
from ..provenance import provenance
from ..study.fingerprints import fingerprint
from ..target.capture import uniform_layers
from ..target.load import Target, full_attention_layers, load_target
from ..target.shared import rope_parameters

DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
VOCABULARY = 1024
KV_LAYERS = 3
POSITIONS = 64  # of a document, drawn anew for each step
SOURCES = ("hidden", "kv")


class HiddenProbe(nn.Module):
    """[m] positions -> [J, m, width]: the standardised fused hidden states, the same for every distance."""

    reads = ("hidden_states",)

    def __init__(self, source, rotary, distances: tuple[int, ...], device):
        super().__init__()
        self.distances = len(distances)
        states = [_rows(source, i, "hidden_states", device).flatten(1)[1:] for i in _sample(source)]
        mean, spread = _moments(torch.cat(states))
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)
        self.width = len(mean)

    def forward(self, state: dict[str, Tensor], positions: Tensor) -> Tensor:
        rows = (state["hidden_states"].flatten(1)[positions] - self.mean) / self.spread
        return rows.expand(self.distances, -1, -1)


class KVProbe(nn.Module):
    """[m] positions -> [J, m, width]: what one head reads over s ≤ t with the learned query of each distance."""

    reads = ("keys", "values")

    def __init__(self, source, rotary: LlamaRotaryEmbedding, distances: tuple[int, ...], device):
        super().__init__()
        self.rotary, spec = rotary, source.spec
        self.heads, self.size = len(spec.kv_layers) * spec.num_kv_heads, spec.head_dim
        sample = _sample(source)
        plain = [self.turned(_rows(source, i, "keys", device).flatten(1, 2), -1)[1:] for i in sample]  # un-rotated
        values = [_rows(source, i, "values", device).flatten(1)[1:] for i in sample]
        mean_key = torch.cat(plain).mean(0)
        places = torch.tensor([-j for j in distances], device=device)
        self.queries = nn.Parameter(self.turned(mean_key.expand(len(distances), -1, -1), 1, places))  # [J, heads, D]
        mean, spread = _moments(torch.cat(values))
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)
        self.width = len(mean)

    def turned(self, heads: Tensor, sign: int, places: Tensor | None = None) -> Tensor:
        """RoPE of ``places`` (0 … n-1 if None) on [n, heads, D]; sign -1 takes it off again."""
        places = torch.arange(len(heads), device=heads.device) if places is None else places
        cos, sin = self.rotary(heads, places[None])
        scale = self.rotary.attention_scaling if sign < 0 else 1.0  # some RoPE variants scale what they turn
        return rotated(heads.transpose(0, 1)[None], (cos / scale**2, sign * sin / scale**2))[0].transpose(0, 1)

    def forward(self, state: dict[str, Tensor], positions: Tensor) -> Tensor:
        keys = state["keys"].flatten(1)  # [n, heads · D]
        values = (state["values"].flatten(1) - self.mean) / self.spread
        distances, count = len(self.queries), len(positions)
        flat = self.queries[:, None].expand(-1, count, -1, -1).flatten(0, 1)  # [J · m, heads, D]
        turned = self.turned(flat, 1, positions.repeat(distances)).flatten(1)
        scores = (turned @ keys.T) * self.size**-0.5
        hidden = torch.arange(len(keys), device=keys.device) > positions.repeat(distances)[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return (weights @ values).view(distances, count, -1)


class Readout(nn.Module):
    """A probe and its maps A_j: state and positions -> logits [J, m, V]."""

    def __init__(self, probe: nn.Module, embedding: Tensor, log_frequency: Tensor, distances: int):
        super().__init__()
        self.probe = probe
        self.maps = nn.Parameter(torch.zeros(distances, probe.width, embedding.shape[1], device=embedding.device))
        self.register_buffer("embedding", nn.functional.normalize(embedding, dim=1))
        self.register_buffer("log_frequency", log_frequency)

    def forward(self, state: dict[str, Tensor], positions: Tensor) -> Tensor:
        return self.probe(state, positions) @ self.maps @ self.embedding.T + self.log_frequency


def _sample(source, documents: int = 32) -> range:
    return range(min(documents, len(source)))


def _rows(source, document: int, name: str, device) -> Tensor:
    return getattr(source.batch([document], (name,)), name)[0, : source.lengths[document]].to(device, torch.float32)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), rows.std(0).clamp(min=1e-6)


def read_document(source, document: int, names: tuple[str, ...], first: int, device) -> tuple[dict, Tensor, Tensor]:
    """State [n, …] in float32, tokens [n], and the positions t ≥ ``first`` that are answer tokens."""
    batch, length = source.batch([document], names), source.lengths[document]
    state = {name: getattr(batch, name)[0, :length].to(device, torch.float32) for name in names}
    places = batch.answer_mask[0, :length].to(device).nonzero()[:, 0]
    return state, batch.tokens[0, :length].to(device), places[places >= first]


def past_tokens(tokens: Tensor, positions: Tensor, distances: tuple[int, ...], to_vocabulary: Tensor) -> Tensor:
    """Index of x_{t-j} among the probe's tokens, -1 if it is not one of them: [J, m]."""
    return torch.stack([to_vocabulary[tokens[positions - j]] for j in distances])


def frequent_tokens(source, size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The most frequent tokens of the training documents (sorted ids), and log-frequencies among them (one added to each count)."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for document in range(len(source)):
        counts += torch.bincount(
            source.batch([document], ()).tokens[0, : source.lengths[document]].cpu(), minlength=vocab_size
        )
    kept = torch.argsort(counts, descending=True, stable=True)[:size].sort().values
    return kept, ((counts[kept] + 1.0) / (counts[kept] + 1.0).sum()).log()


def train_probe(
    readout: Readout, source, distances, to_vocabulary: Tensor, steps: int, seed: int = 0, rate: float = 3e-3
) -> None:
    """Adam with a cosine schedule: each step ``POSITIONS`` random positions of one training document, the mean loss over all distances."""
    device, chance = to_vocabulary.device, np.random.default_rng(seed)
    fitting = [i for i in range(len(source)) if source.lengths[i] > max(distances) + 1]
    groups = [{"params": [readout.maps]}, {"params": list(readout.probe.parameters()), "lr": rate * 3}]
    optimiser = torch.optim.Adam([group for group in groups if group["params"]], lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in tqdm(range(steps), desc=type(readout.probe).__name__, mininterval=5):
        state, tokens, places = read_document(
            source, fitting[chance.integers(len(fitting))], readout.probe.reads, max(distances), device
        )
        if not len(places):
            continue
        drawn = chance.choice(len(places), min(POSITIONS, len(places)), replace=False)
        positions = places[torch.from_numpy(drawn).to(device)]
        wanted = past_tokens(tokens, positions, distances, to_vocabulary)
        logits = readout(state, positions)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


@torch.no_grad()
def score(
    readout: Readout | None, name: str, source, distances, to_vocabulary: Tensor, log_frequency: Tensor
) -> pd.DataFrame:
    """Rows of ``recoverable.csv``; without a readout those of the floor, which always answers with the training frequencies."""
    rows, device = [], to_vocabulary.device
    for document in range(len(source)):
        state, tokens, places = read_document(
            source, document, readout.probe.reads if readout else (), max(distances), device
        )
        totals = torch.zeros(len(distances), 3, dtype=torch.float64)
        for positions in places.split(128):
            wanted = past_tokens(tokens, positions, distances, to_vocabulary)
            logits = readout(state, positions) if readout else log_frequency.expand(*wanted.shape, -1)
            known, index = wanted >= 0, wanted.clamp(min=0)
            nats = -logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]
            parts = [known, known & (logits.argmax(-1) == index), nats * known]
            totals += torch.stack([part.double().sum(1).cpu() for part in parts], dim=1)
        for j, (count, correct, nats) in zip(distances, totals.tolist(), strict=True):
            if count:
                rows.append([name, j, document, int(count), int(correct), nats])
    return tables.rounded(pd.DataFrame(rows, columns=list(tables.SCHEMAS["recoverable"])))


def measure(results_dir: str | Path, steps: int = 0) -> dict[str, Path]:
    """Train and score both probes on the stored features, a file each in RESULTS_DIR/recoverable; those that are there already stay.

    ``steps`` of training: by default one for every 80 training tokens, at most 600 on a CPU and 4,000 on a GPU.
    """
    started, results_dir = time.perf_counter(), Path(results_dir)
    folders = {split: results_dir / "features" / split for split in ("train", "evaluation")}
    target = load_target(read_spec(folders["train"]).target, dtype="float32")
    sources = {split: open_features(folder, target) for split, folder in folders.items()}
    enough = sum(sources["train"].lengths) // 80  # a step takes up to 64 positions: hardly any is drawn twice
    steps = steps or max(1, min(enough, 4000 if target.device.type == "cuda" else 600))
    layers = uniform_layers(full_attention_layers(target.model), KV_LAYERS)
    sources = {split: source.with_kv_layers(layers) for split, source in sources.items()}
    distances = [j for j in DISTANCES if all(max(source.lengths) > 2 * j for source in sources.values())]
    if not distances:
        raise StudyError(f"the documents in {results_dir}/features are too short for a probe; extract longer ones")
    work = results_dir / "recoverable"
    hashes = {split: source.documents_hash for split, source in sources.items()}
    claim(work, fingerprint("probes.readout", {"steps": steps, "layers": layers, "target": target.hash, **hashes}))
    found = [_source_rows(work, name, sources, target, tuple(distances), steps) for name in ("floor", *SOURCES)]
    facts = {"target": target.name, "target_hash": target.hash, "kv_layers": " ".join(map(str, layers)), "steps": steps}
    facts |= {
        "hidden_layers": " ".join(map(str, sources["train"].spec.hidden_layers)),
        "vocabulary": min(VOCABULARY, target.vocab_size),
    }
    facts |= {
        "train_documents": len(sources["train"]),
        "documents": len(sources["evaluation"]),
        "documents_hash": hashes["evaluation"],
    }
    facts |= {"dtype": "float32", "seconds": round(time.perf_counter() - started, 1), **provenance(target.device)}
    made = {"recoverable": pd.concat(found, ignore_index=True), "recoverable_facts": pd.DataFrame([facts])}
    return {name: tables.write(results_dir / "tables", name, table) for name, table in made.items()}


def _source_rows(
    work: Path, name: str, sources: dict, target: Target, distances: tuple[int, ...], steps: int
) -> pd.DataFrame:
    """The rows of one source, from their file if they were made before."""
    if not (path := work / f"{name}.csv").exists():
        kept, log_frequency = frequent_tokens(sources["train"], min(VOCABULARY, target.vocab_size), target.vocab_size)
        to_vocabulary = torch.full((target.vocab_size,), -1).scatter(0, kept, torch.arange(len(kept))).to(target.device)
        log_frequency, readout = log_frequency.to(target.device), None
        if name in SOURCES:
            torch.manual_seed(0)
            kind = {"hidden": HiddenProbe, "kv": KVProbe}[name]
            probe = kind(sources["train"], rotary_of(target, sources["train"].spec), distances, target.device)
            embedding = target.model.get_input_embeddings().weight[kept.to(target.device)].float()
            readout = Readout(probe, embedding, log_frequency, len(distances)).to(target.device)
            train_probe(readout, sources["train"], distances, to_vocabulary, steps)
        write_csv(path, score(readout, name, sources["evaluation"], distances, to_vocabulary, log_frequency))
    return pd.read_csv(path, dtype={"source": str})


def rotary_of(target: Target, spec) -> LlamaRotaryEmbedding:
    """The target's RoPE, from its config."""
    config = target.config
    sizes = LlamaConfig(
        hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads, head_dim=spec.head_dim,
        rope_parameters=rope_parameters(config), max_position_embeddings=config.max_position_embeddings,
    )  # fmt: skip
    return LlamaRotaryEmbedding(sizes).to(target.device)


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.probes.readout", description=__doc__.splitlines()[0])
    parser.add_argument("results_dir", metavar="RESULTS_DIR")
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help="of training; by default 600 on a CPU, 4,000 on a GPU, fewer for few documents",
    )
    given = parser.parse_args(words)
    for path in measure(given.results_dir, given.steps).values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
