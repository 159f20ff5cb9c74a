"""One answer as HTML: every token with its colour and hover text, nothing in it read as markup."""

import html

from kvshot_lib.plots.decoded import KINDS, columns, legend, marked, shaded


def test_every_token_says_what_became_of_it():
    made = marked(
        [("To", "bonus", "round 1"), (" a\n", "rejected", "here the target says '<b>'"), ("<b>", "corrected", "")]
    )
    assert (
        '<s style="' in made and "↵</s>" in made and "&lt;b&gt;</b>" in made and 'says &#x27;&lt;b&gt;&#x27;"' in made
    )
    assert all(colour in legend().data and html.escape(told) in legend().data for colour, _, told in KINDS.values())


def test_shades_follow_the_weights_and_shares_are_of_all():
    made = shaded(["a", "b", "c"], [0.2, 0.6, 0.0])
    assert [made.count(f"0,{shade})") for shade in (0.3, 1.0, 0.0)] == [1, 1, 1]
    assert 'title="25%">a<' in made and 'title="75%">b<' in made


def test_columns_stand_beside_each_other_with_their_titles():
    made = columns(("hidden", "<i>x</i>", "2 < 3 tokens"), ("kv_2", "y", "")).data
    assert (
        made.count("<div style=") == 1 + 2 * 2
        and "<b>hidden</b>" in made
        and "2 &lt; 3 tokens" in made
        and "<i>x</i>" in made
    )
