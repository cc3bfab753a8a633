"""Prompts as files: what they say, what is wrong with them, whose classes they are."""

import pytest

from vestige.errors import RecipeError
from vestige.models.prompts import list_prompts, load_prompts, read_prompts

SOUND = {
    "prompt": 'About <L>: "',
    "labels": {"good": {"aliases": ["positive"]}, "bad": {"word": "BAD"}},
}


@pytest.mark.parametrize("name", list_prompts())
def test_every_shipped_file_is_sound(name):
    prompts = load_prompts(name)
    for label in prompts.names:
        filled = prompts.prompt_of(label, "CONTEXT", "ANSWER")
        assert filled.endswith('"') and "<" not in filled
        assert ("CONTEXT" in filled) == prompts.needs_context
        before, after = prompts.sentence(label, "CONTEXT", "ANSWER")
        assert "<" not in before + after and '"' in after


@pytest.mark.parametrize(
    ("name", "label", "said"),
    [
        (
            "sst2",
            "positive",
            'The movie review in positive sentiment for movie "X" is: "',
        ),
        (
            "qnli",
            "not entailment",
            'Information: "X"\nQuestion (answer not in above information): "',
        ),
        (
            "rte",
            "entailment",
            '"X"\nBased on the above description, the following sentence is definitely correct: "',
        ),
        (
            "ag-news",
            "science and technology",
            'The news articles is in the category of Technology: "',
        ),
        ("yelp", "negative", 'The "X" restaurant review in negative sentiment is: "'),
        ("squad", "answer", 'The context is: "X"\n"Y" is the answer of the following question: "'),
    ],
)  # fmt: skip
def test_templates_are_the_papers(name, label, said):
    assert load_prompts(name).prompt_of(label, "X", "Y") == said


def test_all_mistakes_are_told_at_once():
    raw = {
        "context": "Film: ",
        "labels": {
            "good": {"prompt": 'A <Q> text: "', "aliases": ["same"]},
            "bad": {"prompt": "no quote", "aliases": ["Same"]},
            "none": {},
        },
    }
    with pytest.raises(RecipeError) as caught:
        read_prompts(raw, "mine")
    for told in ("context: got 'Film: '", "<Q>", "no quote", "labels.none: got no prompt",
                 "'Same' is a name of 'good'"):  # fmt: skip
        assert told in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ([], "of type list"),
        ({}, "labels"),
        ({**SOUND, "promt": "x"}, "promt"),
        ({**SOUND, "labels": {"one": {}}}, "at least 2"),
        ({**SOUND, "prompt": 'All: "'}, "same prompt"),
        ({**SOUND, "zero_shot": "no slot"}, "lacks <X>"),
        ({**SOUND, "kind": "pair"}, "lacks <C>"),
        ({**SOUND, "min_words": 0}, "min_words"),
        ({**SOUND, "context": 'F: "', "prompt": '<L> of <C>: "'}, "zero_shot: needed"),
    ],
)
def test_each_mistake_has_its_message(raw, told):
    with pytest.raises(RecipeError, match=told):
        read_prompts(raw, "mine")


def test_labels_are_found_by_name_and_never_by_number():
    prompts = read_prompts(SOUND, "mine").for_classes(["Bad", "POSITIVE"])
    assert prompts.names == ("Bad", "POSITIVE")
    assert prompts.prompt_of("Bad") == 'About BAD: "'
    # The word of a label that gives none is its own name, not the data set's.
    assert prompts.prompt_of("POSITIVE") == 'About good: "'


@pytest.mark.parametrize("classes", [["good"], ["good", "worse"], ["good", "positive"], []])
def test_classes_that_do_not_fit_are_named(classes):
    with pytest.raises(RecipeError, match="for the prompts 'mine'"):
        read_prompts(SOUND, "mine").for_classes(classes)


def test_a_context_may_look_like_a_slot():
    assert load_prompts("sst2").prompt_of("positive", "<L> <X>").count("<L> <X>") == 1


def test_files_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('prompt: "<L>: \\""\nlabels: {a: {}, b: {}}\n')
    assert load_prompts(path).prompt_of("b") == 'b: "'
    path.write_text("labels: [")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_prompts(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_prompts(tmp_path / "gone.yaml")
    with pytest.raises(RecipeError, match="no label"):
        read_prompts(SOUND, "mine").without_label()
