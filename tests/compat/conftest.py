"""`run_both`: a case's script with truetune's classes, then with TRL's."""

import copy

import pytest
import trl
from outcomes import Case, Given, Outcome, run, skip_if_older, train

import truetune
from pairs import llama


@pytest.fixture(scope="module")
def saved_model(_trained_tokenizer, tmp_path_factory) -> str:
    """The directory of a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("named") / "small-llama"
    llama(_trained_tokenizer).save_pretrained(folder)
    _trained_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run_both(rows, tokenizer, saved_model, tmp_path, caplog):
    def run_both(case: Case, act=train) -> tuple[Outcome, Outcome]:
        skip_if_older(case.needs)
        outcomes = []
        for library in (truetune, trl):
            folder = tmp_path / library.__name__
            folder.mkdir()
            given = Given(library, copy.deepcopy(rows), copy.deepcopy(tokenizer), folder, saved_model)
            outcomes.append(run(given, case, act, caplog))
        return outcomes[0], outcomes[1]

    return run_both
