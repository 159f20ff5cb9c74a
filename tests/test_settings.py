"""Settings are of the kind that their annotations say."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvshot_lib.errors import StudyError
from kvshot_lib.settings import at_least, check_settings, check_value


@dataclass(frozen=True)
class Settings:
    flag: bool = False
    count: int = 3
    rate: float = 0.5
    name: str = "mine"
    layers: int | tuple[int, ...] = 3
    names: tuple[str, ...] = ()

    def __post_init__(self):
        check_settings(self)


MEANT = {
    "flag": (bool, "True or False"),
    "count": (int, "a whole number"),
    "rate": ((int, float), "a finite number"),
    "name": (str, "text"),
    "layers": (int, "a whole number or a list, each of it a whole number"),
    "names": ((), "a list, each of it text"),
}
ANYTHING = st.one_of(st.booleans(), st.integers(), st.floats(), st.text(), st.none(), st.binary(), st.lists(st.none()))


@given(name=st.sampled_from([*MEANT]), value=ANYTHING)
def test_a_value_is_taken_as_it_is_or_refused_by_name(name, value):
    kinds, told = MEANT[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = isinstance(value, kinds) and (name == "flag" or not isinstance(value, bool))
    if fits and not (number and not abs(value) <= 1.7976931348623157e308):
        kept = getattr(Settings(**{name: value}), name)
        assert kept == value and type(kept) is type(value)
    else:
        with pytest.raises(StudyError) as refused:
            Settings(**{name: value})
        assert str(refused.value) == f"{name}={value!r} must be {told}"


def test_numbers_of_numpy_and_torch_become_plain_ones():
    found = Settings(flag=np.bool_(True), count=np.int64(4), rate=np.float32(0.25))
    assert (found.flag, found.count, found.rate) == (True, 4, 0.25)
    assert [type(value) for value in (found.flag, found.count, found.rate)] == [bool, int, float]
    assert check_value("rate", torch.tensor(0.5), float) == 0.5
    with pytest.raises(StudyError, match="count=True must be a whole number"):
        Settings(count=np.bool_(True))
    with pytest.raises(StudyError, match="rate=nan must be a finite number"):
        Settings(rate=np.float64(math.nan))


def test_lists_of_the_right_kind():
    assert Settings(layers=(1, 2), names=("a",)).layers == (1, 2)
    for wrong in ((1, True), (1, "2"), (1.0,), [1, 2]):
        with pytest.raises(StudyError, match="layers=.* must be a whole number or a list, each of it a whole number"):
            Settings(layers=wrong)


def test_options_of_a_command_start_somewhere():
    at_least(2, new_tokens=2, repeats=9)
    for value, told in ((1, "--new-tokens is too small: it starts at 2"), (2.5, "--new-tokens=2.5 must be a whole")):
        with pytest.raises(StudyError, match=told):
            at_least(2, new_tokens=value)
