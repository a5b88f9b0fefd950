"""The script that checks the suite with mutations: each one applies, each outcome is reported."""

import subprocess
from collections import Counter
from dataclasses import replace

import pytest

from dev.mutations import (
    MUTATIONS,
    ROOT,
    Mutation,
    State,
    find_symbols,
    locate,
    read_mutations,
    run_mutations,
)
from ipt.errors import UserError

SOURCE = """
class Counter:
    def double(self, x):
        return x * 2  # twice


def add(x, y):
    z = x + y
    return z


def unused(x):
    return x * 2
"""
TEST = """
from ipt.sums import Counter, add

def test_add():
    assert add(2, 1) == 3

def test_double():
    assert Counter().double(3) == 6

def test_broken():
    assert not "fails"
"""
ADD = Mutation("sums", "minus", "add", "x + y", "x - y", "test_sums.py -k add")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    (root / "ipt").mkdir()
    (root / "ipt" / "__init__.py").touch()
    (root / "ipt" / "sums.py").write_text(SOURCE, encoding="utf-8")
    (root / "test_sums.py").write_text(TEST, encoding="utf-8")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def test_each_mutation_applies_to_the_package_as_it_is():
    mutations, symbols = read_mutations(MUTATIONS), find_symbols(ROOT)
    for mutation in mutations:
        locate(mutation, ROOT, symbols)
    areas = Counter(mutation.area for mutation in mutations)
    assert len(mutations) >= 40
    assert len(areas) >= 14
    assert min(areas.values()) >= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"symbol": "subtract"}, "symbol subtract: not found in ipt/"),
        ({"symbol": "dd"}, "symbol dd: not found"),
        ({"old": "x * y"}, r"symbol add: 'x \* y' occurs 0 times in ipt/sums.py:7-9"),
        ({"old": "z"}, "'z' occurs 2 times"),
        ({"symbol": "other.add"}, "not found"),
    ],
)
def test_what_is_not_there_once_is_an_error(project, changes, message):
    with pytest.raises(UserError, match=message):
        locate(replace(ADD, **changes), project, find_symbols(project))


def test_a_symbol_in_two_modules_needs_the_name_of_its_module(project, tmp_path):
    package = tmp_path / "ipt"
    package.mkdir()
    for name in ("sums.py", "others.py"):
        (package / name).write_text(SOURCE, encoding="utf-8")
    symbols = find_symbols(tmp_path)
    message = r"found 2 times, expected once: ipt\.others\.add, ipt\.sums\.add"
    with pytest.raises(UserError, match=message):
        locate(ADD, tmp_path, symbols)
    assert str(locate(replace(ADD, symbol="others.add"), tmp_path, symbols).path) == "ipt/others.py"


def test_two_mutations_of_one_name_are_an_error(tmp_path):
    entry = "{name: a, symbol: b, old: c, new: d, tests: e}"
    (tmp_path / "list.yaml").write_text(f"x: [{entry}]\ny: [{entry}]\n", encoding="utf-8")
    with pytest.raises(UserError, match="2 mutations have the name a"):
        read_mutations(tmp_path / "list.yaml")


def test_what_becomes_of_mutations(project):
    expected = [
        ({}, State.CAUGHT, "test_sums.py::test_add"),
        ({"tests": "test_sums.py -k double"}, State.SURVIVED, ""),
        ({"tests": "test_sums.py -k broken"}, State.ERROR, "fails without the mutation too"),
        ({"new": "x +"}, State.ERROR, "is invalid Python"),
        ({"old": "x * y"}, State.ERROR, "occurs 0 times"),
    ]
    outcomes = run_mutations([replace(ADD, **changes) for changes, _, _ in expected], project)
    for outcome, (_, state, detail) in zip(outcomes, expected, strict=True):
        assert outcome.state == state
        assert detail in outcome.detail
    assert (project / "ipt" / "sums.py").read_text(encoding="utf-8") == SOURCE
