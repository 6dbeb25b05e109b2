"""The leakage check on its own: what counts as the same word, and what as a time."""

import pytest

from moss_train.synthesis.leakage import clock_words, leaked, stem

SEEN = ["Two men stand beside a red car."]
LATER = ["A dog runs past and they start running.", "3 women paint the house green."]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Two men stand beside a red car.", []),
        ("2 men are standing beside the cars.", []),
        ("A dog.", ["dog"]),
        ("Dogs!", ["dogs"]),
        ("They ran? They run.", ["run"]),  # an irregular form is another word
        ("Now they are painting three houses.", ["painting", "three", "houses"]),
        ("Then there are 3 of them.", ["3"]),
        ("The men's car, then.", []),
        ("A helicopter.", []),  # nobody holds it: an invention, but no leak
    ],
)
def test_words_that_only_later_captions_hold(text, words):
    assert leaked(text, SEEN, LATER) == words


def test_a_word_of_the_question_may_be_used():
    assert leaked("No dog yet.", [*SEEN, "Is there a dog?"], LATER) == []


@pytest.mark.parametrize("words", ["walk walks walked walking", "run runs running", "dance dances dancing danced",
                                   "player players", "carry carries", "two 2", "box boxes", "slow slowly"])  # fmt: skip
def test_forms_of_a_word_have_one_stem(words):
    assert len({stem(word) for word in words.split()}) == 1


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("At 0:12 he sits.", ["0:12"]),
        ("After 5 seconds.", ["5 seconds"]),
        ("Two cars.", []),
        ("In 12.5s.", ["12.5s"]),
        ("Twelve seconds later he sits.", ["Twelve seconds"]),
        ("At second 12.", ["second 12"]),
        ("The second man has two.", []),
        ("One of them.", []),
    ],
)
def test_times_are_found(text, times):
    assert clock_words(text, SEEN) == times
    assert clock_words(text, [text]) == []
