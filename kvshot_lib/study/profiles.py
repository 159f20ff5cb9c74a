"""TODO"""

import ast
import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from ..drafters.variants import VARIANTS, check_current, parameters_of
from ..errors import StudyError
from .parameters import check_names, check_no_number_as_text, check_parameters, read_code_cells

NOTEBOOKS = {
    "generate": "notebooks/00_generate_corpus.ipynb",
    "extract": "notebooks/01_extract_kv_cache.ipynb",
    "train": "notebooks/02_train_drafter.ipynb",
    "decay": "notebooks/03_long_range_decay.ipynb",
    "queries": "notebooks/04_query_estimation.ipynb",
    "gradients": "notebooks/05_gradient_flow.ipynb",
    "prefix": "notebooks/06_information_in_the_prefix.ipynb",
    "decode": "notebooks/07_decode_end_to_end.ipynb",
    "scorecard": "notebooks/08_paper_scorecard.ipynb",
    "beyond": "notebooks/09_beyond_ttt.ipynb",
}


OPTIONAL = ("generate", "queries", "gradients", "prefix", "decode", "scorecard", "beyond", "dialogues")


# What `dialogues` may hold: options of kvshot_lib.text.generate. Its target, device and dtype are those of `extract`.
DIALOGUES = (
    "user_turns", "train", "validation", "evaluation", "max_length_tokens", "max_user_tokens", "temperature", "top_p", "batch_size", "seed",
    "thinking",
)  # fmt: skip


CHECKPOINTS = Path("data/checkpoints")


# What a profile may say of the measuring of speed: options of `python -m kvshot_lib.decoding.timing`.
SPEED = (
    "threads",
    "new_tokens",
    "repeats",
    "prompts",
    "prompts_per_category",
    "chain",
    "tree",
    "prefix",
    "step_tokens",
    "lookup_tokens",
)


SET_BY_PIPELINE = {"results_dir", "figures_dir", "tables_dir", "variant", "seed", "profile"}


@dataclass(frozen=True)
class Profile:
    """What a profile file says; each dict holds parameters of one notebook.

    Attributes
    ----------
    generate : for notebook 00, which the pipeline runs only if the profile has this key.
    dialogues : options of `kvshot_lib.text.generate`; the target of `extract` writes (or answers) them first, and they are the corpus.
    extract, train, decay : for notebooks 01, 02 (every drafter) and 03.
    queries : for notebook 04; the pipeline measures what it draws and runs it only if the profile has this key.
    gradients : for notebook 05, which the pipeline runs only if the profile has this key, after measuring gradient flow.
    prefix : for notebook 06; the pipeline measures what it draws and runs it only if the profile has this key.
    decode : for notebook 07, which the pipeline runs only if the profile has this key, after measuring decoding speed on an idle machine.
    speed : options of that measuring (`SPEED`), lists for those that take several numbers: ``{new_tokens: 32, chain: [2, 4]}``.
    scorecard : for notebook 08, which the pipeline runs only if the profile has this key.
    beyond : for notebook 09, which the pipeline runs only if the profile has this key, after counting FLOPs.
    checkpoints : names of published drafters (folders of data/checkpoints), judged beside the trained ones.
    drafters : variant name to the parameters of notebook 02 that make it; the file may just list names of `VARIANTS`.
    seeds : every drafter is trained once with each.
    parallel_trainings : how many trainings may run side by side, at most; 0 means one a core, and more than cores is fine.
        On a GPU it is what fits its memory: all of them run on the same one.
    """

    name: str
    generate: dict | None = None
    dialogues: dict | None = None
    extract: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    decay: dict = field(default_factory=dict)
    queries: dict | None = None
    gradients: dict | None = None
    prefix: dict | None = None
    decode: dict | None = None
    speed: dict = field(default_factory=dict)
    scorecard: dict | None = None
    beyond: dict | None = None
    checkpoints: list = field(default_factory=list)
    drafters: dict = field(default_factory=dict)
    seeds: list = field(default_factory=lambda: [0])
    parallel_trainings: int = 0


def load_profile(name_or_path: str | Path) -> Profile:
    """Read notebooks/profiles/<name>.yaml, or the file at a path that ends in ``.yaml``.

    Raises
    ------
    StudyError : no such profile, unknown keys, wrong kinds of value, or a name that the pipeline sets itself.
    """
    folder = Path("notebooks/profiles")
    path = Path(name_or_path) if str(name_or_path).endswith(".yaml") else folder / f"{name_or_path}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or f"none in {path.parent}"
        raise StudyError(f"there is no profile {path}; known: {known}")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    kinds = {f.name: f.type for f in fields(Profile) if f.name != "name"}
    check_names(content, kinds, f"profile {path.name}")
    for key, value in content.items():
        kind = dict if key in OPTIONAL else kinds[key]
        if not isinstance(value, kind) and not (key == "drafters" and isinstance(value, list)):
            raise StudyError(f"profile {path.name}: '{key}' must be a {kind.__name__}, not {value!r}")
    content["drafters"] = resolve_drafters(content.get("drafters", {}), f"profile {path.name}")
    if content.get("dialogues") is not None:
        check_names(content["dialogues"], DIALOGUES, f"profile {path.name}, dialogues")
        if "corpus" in content.get("extract", {}):
            raise StudyError(f"profile {path.name}, extract: with 'dialogues' they are the corpus; take 'corpus' out")
    profile = Profile(name=path.stem, **content)
    drafters = {f"drafters.{variant}": given for variant, given in profile.drafters.items()}
    sections = {key: content[key] for key in NOTEBOOKS if key in content}
    for where, parameters in (sections | drafters).items():
        check_section(f"profile {path.name}, {where}", parameters)
    return profile


def generate_words(profile: Profile) -> list[str]:
    """Options of `kvshot_lib.text.generate` that write the profile's dialogues, apart from ``--out``."""
    words = []
    shared = {name: value for name, value in profile.extract.items() if name in ("target", "device", "dtype")}
    for name, value in (shared | profile.dialogues).items():
        option = name.replace("_", "-")
        words += (
            [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
        )
    return words


def resolve_drafters(given: list | dict, where: str) -> dict[str, dict]:
    """Variant name to parameters, for a list of the study's names, or for a mapping that may also make other drafters.

    A name of the study always means the study's drafter: parameters given for it (a budget, say) are added to its own, and
    one that changes its own is refused. Another name needs parameters.
    """
    found = {}
    for name in given:
        parameters = given[name] if isinstance(given, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise StudyError(f"{where}: {name!r} is no name for a drafter; use letters, digits, _ and -")
        check_current([name])
        if not isinstance(parameters, dict | None):
            raise StudyError(f"{where}, drafters.{name} must be a mapping of parameters, not {parameters!r}")
        if not parameters:
            check_names([name], VARIANTS, f"{where}, drafters: the study")
        own, parameters = parameters_of(name), parameters or {}
        for key in own.keys() & parameters.keys():
            if own[key] != parameters[key]:
                raise StudyError(
                    f"{where}: the study's '{name}' has {key}={own[key]!r}; with {parameters[key]!r} give it another name"
                )
        found[name] = own | parameters
    return found


def check_section(where: str, parameters: object) -> None:
    """Check one section of a profile, apart from which names its notebook knows."""
    if not isinstance(parameters, dict):
        raise StudyError(f"{where} must be a mapping of parameters, not {parameters!r}")
    for name, value in parameters.items():
        if name in SET_BY_PIPELINE:
            raise StudyError(f"{where}: '{name}' is set by the pipeline; take it out")
        check_no_number_as_text(f"{where}, {name}", value)


def check_profile(profile: Profile) -> None:
    """Refuse parameters that the notebooks don't have and warm starts from nowhere, before anything runs.

    Raises
    ------
    StudyError : names the profile's section, the parameter and the valid names.
    """
    for key, notebook in NOTEBOOKS.items():
        if getattr(profile, key) is not None:
            check_parameters(notebook, getattr(profile, key))
    for variant, parameters in profile.drafters.items():
        check_parameters(NOTEBOOKS["train"], parameters)
        check_start(profile, variant)
    speed_words(profile)
    if not profile.drafters or not profile.seeds:
        raise StudyError(f"profile {profile.name} has no drafters or no seeds, so there is nothing to train")
    published = sorted(path.parent.name for path in CHECKPOINTS.glob("*/drafter.json"))
    check_names(profile.checkpoints, published, f"profile {profile.name}, checkpoints: {CHECKPOINTS}")
    for seed in profile.seeds:
        if not isinstance(seed, int) or seed < 0:
            raise StudyError(f"profile {profile.name}: seed {seed!r} must be a whole number, 0 or more")


def speed_words(profile: Profile) -> list[str]:
    """The profile's options of `kvshot_lib.decoding.timing` as words of its command line.

    >>> speed_words(Profile("mine", speed={"new_tokens": 32, "chain": [2, 4]}))
    ['--new-tokens', '32', '--chain', '2,4']
    """
    check_names(profile.speed, SPEED, f"profile {profile.name}, speed")
    words = []
    for name, value in profile.speed.items():
        value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{name.replace('_', '-')}", value]
    return words


def check_start(profile: Profile, variant: str) -> None:
    """Follow ``init_from`` from drafter to drafter, to one that starts from nothing."""
    passed, here = [], variant
    while start := (profile.train | profile.drafters[here]).get("init_from"):
        if start not in profile.drafters:
            raise StudyError(
                f"profile {profile.name}: '{here}' starts from '{start}', which is not among its drafters; add it there"
            )
        passed.append(here)
        if start in passed:
            raise StudyError(
                f"profile {profile.name}: '{variant}' starts from itself, by {' from '.join([*passed, start])}"
            )
        here = start


def named_runs(profile: Profile, names: Sequence[str] = ()) -> list[tuple[str, int]]:
    """The profile's runs as (variant, seed): those that ``names`` calls VARIANT/seedN, in that order, or all, seed by seed.

    Raises
    ------
    StudyError : a name that is none of them.
    """
    known = {f"{variant}/seed{seed}": (variant, seed) for seed in profile.seeds for variant in profile.drafters}
    if unknown := [name for name in names if name not in known]:
        raise StudyError(f"{', '.join(unknown)}: not among the runs of {profile.name}, which are {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


def check_drafters(profile: Profile) -> None:
    """Refuse values that no drafter or training can have, as the trainings would. (It imports torch: some seconds.)

    Every parameter of notebook 02 that is a field of `DrafterConfig` or `TrainConfig` goes there.

    Raises
    ------
    StudyError : names the profile's drafter and what is wrong with it.
    """
    from ..drafters.drafter import DrafterConfig
    from ..training.loop import TrainConfig
    from ..training.objective import check_objective

    defaults = parameter_defaults(NOTEBOOKS["train"])
    for variant, parameters in profile.drafters.items():
        values = defaults | profile.train | parameters
        try:
            configs = [
                config(**{f.name: values[f.name] for f in fields(config) if f.name in values})
                for config in (DrafterConfig, TrainConfig)
            ]
            check_objective(*configs)
            for name in ("draft_vocab_size", "draft_length"):
                if values.get(name, 1) < 1:
                    raise StudyError(f"{name}={values[name]} must be 1 or more")
            if configs[0].paradigm == "block" and values.get("draft_length", 1) >= configs[0].block_size:
                raise StudyError(
                    f"draft_length={values['draft_length']} must be below block_size={configs[0].block_size}"
                )
        except (StudyError, TypeError) as error:
            raise StudyError(f"profile {profile.name}, drafter '{variant}': {error}") from error


def parameter_defaults(notebook: str | Path) -> dict:
    """Names and values in the notebook's ``parameters`` cell; only plain values, no expressions.

    Raises
    ------
    StudyError : no notebook there.
    """
    found = {}
    for cell in read_code_cells(notebook):
        for node in ast.parse(cell.source).body if "parameters" in cell.tags else ():
            with contextlib.suppress(ValueError, AttributeError):
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return found
