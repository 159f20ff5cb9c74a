"""What a profile (notebooks/profiles/NAME.yaml) says: which drafters, how much, and every notebook's parameters."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..drafters.variants import VARIANTS, parameters_of
from ..errors import StudyError
from ..training.config import configurations
from .notebooks import check_names, check_no_number_as_text, check_parameters, parameter_defaults
from .options import of_dialogues, of_speed, option_names

NOTEBOOKS = {
    "generate": "notebooks/00_generate_corpus.ipynb",
    "extract": "notebooks/01_extract_kv_cache.ipynb",
    "train": "notebooks/03_train_drafter.ipynb",
    "decay": "notebooks/04_long_range_decay.ipynb",
    "bottlenecks": "notebooks/05_find_bottlenecks.ipynb",
    "prefix": "notebooks/06_information_in_the_prefix.ipynb",
    "decode": "notebooks/07_decode_end_to_end.ipynb",
    "scorecard": "notebooks/08_paper_scorecard.ipynb",
    "beyond": "notebooks/09_beyond_ttt.ipynb",
    "sources": "notebooks/12_compare_sources.ipynb",
    "context": "notebooks/15_lengthen_the_context.ipynb",
    "longer": "notebooks/16_train_longer.ipynb",
    "second_target": "notebooks/17_change_the_target.ipynb",
}
DRAWING = tuple(NOTEBOOKS)[3:]  # these read tables and draw; those before them make numbers
FOLDER = Path("notebooks/profiles")
CHECKPOINTS = Path("data/checkpoints")
SET_BY_PIPELINE = {"results_dir", "figures_dir", "tables_dir", "variant", "seed", "profile"}
ALWAYS = {"extract": {}, "train": {}, "decay": {}}
KINDS = {"dialogues": dict, "speed": dict, "checkpoints": list, "seeds": list}
KINDS |= {"parallel_trainings": int, "threads": int}


@dataclass(frozen=True)
class Profile:
    """What a profile file says.

    Attributes
    ----------
    notebooks : parameters of the notebooks that run, by key of `NOTEBOOKS`: extract, train and decay always do (a file
        may leave out ``decay`` by null), others where the file has their key.
    dialogues : options of `kvshot generate`; the target of `extract` writes (or answers) them: they are the corpus.
    speed : options of `kvshot decode speed`, measured for ``decode``; lists for those that take several numbers.
    checkpoints : names of published drafters (folders of data/checkpoints), judged beside the trained ones.
    drafters : variant name to the training parameters that make it; the file may just list names of `VARIANTS`.
    seeds : every drafter is trained once with each.
    parallel_trainings : how many trainings may run side by side, at most; 0 means one a core, and more than cores is
        fine. On a GPU it is what fits its memory: all of them run on the same one.
    threads : the most that one job may use; 0 means every core.
    """

    name: str
    notebooks: dict = field(default_factory=dict)
    dialogues: dict | None = None
    speed: dict = field(default_factory=dict)
    checkpoints: list = field(default_factory=list)
    drafters: dict = field(default_factory=dict)
    seeds: list = field(default_factory=lambda: [0])
    parallel_trainings: int = 0
    threads: int = 0

    @property
    def extract(self) -> dict:
        """Parameters of the extraction that the file sets."""
        return self.notebooks["extract"]

    @property
    def train(self) -> dict:
        """Parameters that the file sets for every training."""
        return self.notebooks["train"]

    @property
    def results(self) -> Path:
        """The folder that its study writes."""
        return Path("results") / self.name


def load_profile(name_or_path: str | Path) -> Profile:
    """Read notebooks/profiles/<name>.yaml, or the file at a path that ends in ``.yaml``.

    Raises
    ------
    StudyError : no such profile, unknown keys, wrong kinds of value, or a name that the pipeline sets itself.
    """
    path = Path(name_or_path) if str(name_or_path).endswith(".yaml") else FOLDER / f"{name_or_path}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or f"none in {path.parent}"
        raise StudyError(f"there is no profile {path}; known: {known}")
    where = f"profile {path.name}"
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    check_names(content, [*NOTEBOOKS, *KINDS, "drafters"], where)
    drafters = resolve_drafters(content.pop("drafters", {}), where)
    notebooks = ALWAYS | {key: content.pop(key) for key in NOTEBOOKS if key in content}
    if notebooks["decay"] is None:
        del notebooks["decay"]
    for key, value in (notebooks | content).items():
        if not isinstance(value, kind := KINDS.get(key, dict)):
            raise StudyError(f"{where}: '{key}' must be a {kind.__name__}, not {value!r}")
    own = {f"drafters.{variant}": parameters for variant, parameters in drafters.items()}
    for section, parameters in (notebooks | own).items():
        for name, value in parameters.items():
            if name in SET_BY_PIPELINE:
                raise StudyError(f"{where}, {section}: '{name}' is set by the pipeline; take it out")
            check_no_number_as_text(f"{where}, {section}, {name}", value)
    for section, part in (("dialogues", of_dialogues), ("speed", of_speed)):
        check_names(content.get(section, {}), option_names(part), f"{where}, {section}")
    if "dialogues" in content and "corpus" in notebooks["extract"]:
        raise StudyError(f"{where}, extract: with 'dialogues' they are the corpus; take 'corpus' out")
    return Profile(path.stem, notebooks, drafters=drafters, **content)


def resolve_drafters(given: list | dict, where: str) -> dict[str, dict]:
    """Variant name to parameters, for a list of the study's names, or for a mapping that may also make other drafters.

    A name of the study always means the study's drafter: parameters given for it (a budget, say) are added to its own,
    and one that changes its own is refused. Another name needs parameters.
    """
    if not isinstance(given, list | dict):
        raise StudyError(f"{where}: 'drafters' must be a list of names or a mapping, not {given!r}")
    found = {}
    for name in given:
        parameters = (given[name] if isinstance(given, dict) else None) or {}
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise StudyError(f"{where}: {name!r} is no name for a drafter; use letters, digits, _ and -")
        if not isinstance(parameters, dict):
            raise StudyError(f"{where}, drafters.{name} must be a mapping of parameters, not {parameters!r}")
        if not parameters:
            check_names([name], VARIANTS, f"{where}, drafters: the study")
        own = parameters_of(name)
        for key in own.keys() & parameters.keys():
            if own[key] != parameters[key]:
                told = f"{where}: the study's '{name}' has {key}={own[key]!r}"
                raise StudyError(f"{told}; with {parameters[key]!r} give it another name")
        found[name] = own | parameters
    return found


def checked_profile(name_or_path: str | Path) -> Profile:
    """`load_profile`, and refuse what would stop a notebook or a training later.

    Raises
    ------
    StudyError : names the profile's section or drafter and what is wrong with it.
    """
    profile = load_profile(name_or_path)
    where = f"profile {profile.name}"
    if not profile.drafters or not profile.seeds:
        raise StudyError(f"{where} has no drafters or no seeds, so there is nothing to train")
    for key, parameters in profile.notebooks.items():
        check_parameters(NOTEBOOKS[key], parameters)
    for variant, parameters in profile.drafters.items():
        check_parameters(NOTEBOOKS["train"], parameters)
        check_start(profile, variant)
        try:
            configurations(train_values(profile, variant, 0))
        except (StudyError, TypeError) as error:
            raise StudyError(f"{where}, drafter '{variant}': {error}") from error
    published = sorted(path.parent.name for path in CHECKPOINTS.glob("*/drafter.json"))
    check_names(profile.checkpoints, published, f"{where}, checkpoints: {CHECKPOINTS}")
    for seed in profile.seeds:
        if not isinstance(seed, int) or seed < 0:
            raise StudyError(f"{where}: seed {seed!r} must be a whole number, 0 or more")
    return profile


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
            told = " from ".join([*passed, start])
            raise StudyError(f"profile {profile.name}: '{variant}' starts from itself, by {told}")
        here = start


def extract_values(profile: Profile, results_dir: str | Path) -> dict:
    """Every parameter of the extraction; where the study writes its own dialogues, they are the corpus."""
    own = {"corpus": str(Path(results_dir) / "corpus")} if profile.dialogues is not None else {}
    return parameter_defaults(NOTEBOOKS["extract"]) | profile.extract | own


def dialogue_options(profile: Profile) -> dict:
    """Options of `kvshot generate` for the profile's own dialogues; their target is that of ``extract``."""
    shared = ("target", "device", "dtype")
    return {name: profile.extract[name] for name in shared if name in profile.extract} | (profile.dialogues or {})


def train_values(profile: Profile, variant: str, seed: int) -> dict:
    """Every parameter of one training."""
    return parameter_defaults(NOTEBOOKS["train"]) | profile.train | profile.drafters[variant] | {"seed": seed}


def named_runs(profile: Profile, names: Sequence[str] = ()) -> list[tuple[str, int]]:
    """The profile's runs as (variant, seed): those that ``names`` calls VARIANT/seedN, in that order, or all, by seed.

    Raises
    ------
    StudyError : a name that is none of them.
    """
    known = {f"{variant}/seed{seed}": (variant, seed) for seed in profile.seeds for variant in profile.drafters}
    if unknown := [name for name in names if name not in known]:
        raise StudyError(f"{', '.join(unknown)}: not among the runs of {profile.name}, which are {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


def option_words(options: Mapping[str, object]) -> list[str]:
    """Options as words of the command line.

    >>> option_words({"chains": [2, 4], "tree": [], "thinking": False})
    ['--chains', '2,4', '--tree', 'none', '--no-thinking']
    """
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)]
    return words
