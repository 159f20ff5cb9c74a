"""Standing around methods: what is seen, what is changed, and that nothing of it stays."""

import pytest
import torch
from torch import nn

from kvshot_lib.drafters.hooks import watching


class Doubled(nn.Module):
    def forward(self, inputs, times=1):
        return self.double(inputs) * times

    def double(self, inputs):
        return 2 * inputs


@pytest.fixture
def pair():
    modules = {"first": Doubled(), "second": Doubled()}
    return modules, nn.Sequential(*modules.values())


def test_calls_go_around_in_order_and_what_is_given_back_counts(pair):
    modules, both = pair
    seen = []

    def around(key, method, inputs, **named):
        seen.append((key, inputs.item()))
        return method(inputs, **named) + 1

    with watching(modules, "forward", around):
        assert both(torch.tensor(1.0)).item() == 7  # 2 · (2 · 1 + 1) + 1
        assert modules["first"](torch.tensor(1.0), times=5).item() == 11
    assert seen == [("first", 1), ("second", 3), ("first", 1)]
    assert both(torch.tensor(1.0)).item() == 4 and all(vars(m).get("forward") is None for m in modules.values())


def test_the_last_one_in_is_outermost_and_both_go(pair):
    modules, both = pair
    with watching(modules, "double", lambda _key, method, x: method(x) + 1):
        with watching(modules, "double", lambda _key, method, x: 10 * method(x)):
            assert modules["first"](torch.tensor(1.0)).item() == 30
        assert modules["first"](torch.tensor(1.0)).item() == 3
    assert both(torch.tensor(1.0)).item() == 4


def test_an_error_takes_it_off_again_and_a_methods_replacement_stays(pair):
    modules, _ = pair
    compiled = modules["second"].double = lambda x: 3 * x  # as torch.compile leaves it: the module's own attribute
    with pytest.raises(ZeroDivisionError), watching(modules, "double", lambda *_: 1 / 0):
        modules["second"](torch.tensor(1.0))
    assert "double" not in vars(modules["first"]) and vars(modules["second"])["double"] is compiled
    with pytest.raises(AttributeError), watching(modules, "triple", lambda *_: None):
        pass
    assert "triple" not in vars(modules["first"])


def test_around_a_compiled_method(pair):
    modules, _ = pair
    modules["first"].double = torch.compile(modules["first"].double, backend="eager")
    seen = []
    with watching(modules, "double", lambda key, method, x: seen.append(key) or method(x)):
        assert modules["first"](torch.tensor(1.0)).item() == 2
    assert seen == ["first"] and modules["first"](torch.tensor(1.0)).item() == 2
