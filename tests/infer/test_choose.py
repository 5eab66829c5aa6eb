"""One answer from several samples."""

import numpy as np
import pytest

from jaxalope import InputError
from jaxalope.infer.choose import best_of_n, boxed_answer, self_consistency

TEXT = [r"so \boxed{4}", r"\boxed{5}", r"it is \boxed{4}.", "none", "none", "none"]
LOGPROBS = [np.array(x) for x in ([-3.0], [-1.0], [-2.0, -4.0], [-1.0, -1.0], [-0.5], [])]


def test_best_of_n_is_the_verifiers_choice_then_the_mean_log_probability():
    assert best_of_n(TEXT, LOGPROBS, 3) == [1, 4]
    assert best_of_n(TEXT, LOGPROBS, 3, lambda t: "4" in t) == [0, 4]


def test_self_consistency_counts_answers_and_leaves_out_texts_without():
    first, second = self_consistency(TEXT, LOGPROBS, 3)
    assert (first.answer, first.index, first.votes) == ("4", 0, 2)
    assert first.share == pytest.approx(2 / 3)
    assert first.answers == ["4", "5", "4"]
    assert second.answer is None and second.index is None


def test_ties_go_to_the_larger_summed_probability():
    """.3 + .3 against .5 + .05: more together, though the single likeliest is the other's."""
    answers, p = ["a", "a", "b", "b"], np.log([0.3, 0.3, 0.5, 0.05])
    (vote,) = self_consistency(answers, p, 4, lambda t: t)
    assert (vote.answer, vote.votes) == ("a", 2)
    (vote,) = self_consistency(answers, np.log([0.1, 0.3, 0.4, 0.05]), 4, lambda t: t)
    assert (vote.answer, vote.index) == ("b", 2)


def test_without_a_likelihood_a_verifier_or_the_votes_decide():
    assert best_of_n(TEXT, None, 3, lambda t: "4" in t) == [0, 3]
    with pytest.raises(InputError, match="verifier"):
        best_of_n(TEXT, None, 3)
    first, second = self_consistency(TEXT, None, 3)
    assert (first.answer, first.index, first.votes, second.answer) == ("4", 0, 2, None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed {2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        ("no box", None),
    ],
)
def test_boxed_answer(text, answer):
    assert boxed_answer(text) == answer


def test_samples_must_come_in_groups():
    with pytest.raises(InputError, match="n=4"):
        best_of_n(TEXT, LOGPROBS, 4)
