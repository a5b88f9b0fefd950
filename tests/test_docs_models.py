"""docs/models.md is what the check before a training finds."""

from dev import models_table


def test_the_table_of_models_is_current():
    assert models_table.PAGE.read_text(encoding="utf-8") == models_table.page(), (
        "run python -m dev.models_table"
    )


def test_the_models_that_the_table_calls_tested_are_those_of_the_tests():
    from tests.training.model_cases import SUPPORTED

    assert (
        {kind for kind, _ in SUPPORTED.values()}
        == set(models_table.TESTED)
        <= set(models_table.ARCHITECTURES)
    )
