"""`python -m benchmarks`: what it collects, what it keeps, what it says of benchmarks that fail;
and two of the benchmarks, very small.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import BENCHMARKS
from benchmarks.results import Comparison, alternate, markdown_table, read_report, spread
from benchmarks.suite import Benchmark, run_all

ROOT = Path(__file__).resolve().parents[1]
LOOPS = """
import argparse
from benchmarks.results import Comparison, add_json_option, alternate, clocked, report

parser = argparse.ArgumentParser()
parser.add_argument("--count", type=int)
add_json_option(parser)
arguments = parser.parse_args()
with open({runs!r}, "a") as file:
    file.write("run\\n")
counts = dict(short=arguments.count, long=500 * arguments.count)
works = dict()
for name, count in counts.items():
    works[name] = clocked(lambda count=count: sum(range(count)))
seconds = alternate(works, passes=3, warm_up=1)
rates = [[arguments.count / one for one in taken] for taken in seconds.values()]
report([
    Comparison(
        "a loop", "s", seconds["short"], "long | loop", seconds["long"],
        less_is_better=True, note="the sums differ",
    ),
    Comparison("its rate", "loops/s", rates[0], "long loop", rates[1]),
    Comparison("another", peer="nobody", missing="it is not here"),
], arguments.json)
"""


@pytest.fixture
def loops(tmp_path):
    script = tmp_path / "loops.py"
    script.write_text(LOOPS.format(runs=str(tmp_path / "runs")))
    return Benchmark("loops", script, ("--count", "5000"))


@pytest.fixture
def broken(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("print('so far so good')\nraise SystemExit('no such device')\n")
    return Benchmark("broken", script)


def rows_of(page: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.replace("\\|", "/").split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith("|")
    ]


def test_figures_are_collected_kept_and_taken_again(loops, broken, tmp_path):
    folder = tmp_path / "results"
    silent = Benchmark("silent", tmp_path / "silent.py")
    silent.script.write_text("")
    benchmarks = [loops, broken, silent]
    assert run_all(benchmarks, folder, only=["loops"])
    page = (folder / "results.md").read_text()
    assert [(row[4], row[8]) for row in rows_of(page) if row[0] == "broken"] == [
        ("not measured", "not run yet")
    ]

    assert not run_all(benchmarks, folder)
    assert (tmp_path / "runs").read_text() == "run\n", "what has finished is kept"
    page = (folder / "results.md").read_text()
    found = {(row[0], row[1]): row for row in rows_of(page)}
    assert found["broken", "all"][8] == "failed with code 1: no such device"
    assert found["silent", "all"][8] == "it ended without figures"
    assert found["gpu", "all"][4] == found["loops", "another"][4] == "not measured"
    assert found["loops", "a loop"][3] == "long / loop"
    records = {
        record["benchmark"]: record for record in json.loads((folder / "results.json").read_text())
    }
    loop, *_ = records["loops"]["comparisons"]
    ratios = sorted(
        theirs / ours for ours, theirs in zip(loop["ours"], loop["theirs"], strict=True)
    )
    assert len(ratios) == 3
    assert ratios[1] > 5, "one loop is five hundred times as long"
    assert found["loops", "a loop"][6] == found["loops", "its rate"][6] == spread(ratios, "x")
    assert records["broken"]["reason"] == "failed with code 1: no such device"
    assert "torch threads" in page
    assert records["loops"]["commit"] in page

    other = [Benchmark("loops", loops.script, ("--count", "4000"))]
    assert run_all(other, folder)
    assert run_all(other, folder, again=True)
    assert (tmp_path / "runs").read_text() == "run\n" * 3, (
        "another command is another result, and --again runs it again"
    )


def test_sides_take_turns():
    calls = []
    sides = {
        name: lambda name=name: calls.append(name) or len(calls) for name in ("ours", "theirs")
    }
    assert alternate(sides, passes=2, warm_up=1) == {"ours": [3, 5], "theirs": [4, 6]}
    assert calls == ["ours", "theirs"] * 3


def test_ratios_say_how_many_times_better():
    assert Comparison("", ours=[2.0, 9.0, 4.0], theirs=[1.0, 3.0, 1.0]).ratios == [2, 3, 4]
    assert Comparison("", ours=[1.0, 2.0], theirs=[4.0, 1.0], less_is_better=True).ratios == [
        4,
        0.5,
    ]
    assert spread([3, 1, 1000], "x") == "3x (1 to 1,000)"
    assert spread([0.12345]) == "0.123"
    assert spread([]) == ""


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.text(alphabet="x|\n ")), min_size=1))
def test_tables_have_a_cell_for_each_column(rows):
    lines = markdown_table(rows)
    assert len(lines) == len(rows) + 2
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert not any("\n" in line for line in lines)


def run_script(script: str, *options: str) -> list[Comparison]:
    report = Path(options[-1])
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *options[:-1], "--json", report],
        check=True,
        capture_output=True,
    )
    return read_report(report)


def test_rendering_beside_code_of_the_released_form(tmp_path):
    """The authors' code cannot be had here: this has the two functions that the benchmark calls, as
    they are called.
    """
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "read_compre.py").write_text(
        "def cook_pt_entries(collection, random_seed):\n"
        "    assert [entry['inherit_from_prev'] for entry in collection] == [place > 0 for place "
        "in range(len(collection))]\n"
        "    return [entry['context'] + pair['Q'] + pair['A'] for entry in collection for pair in "
        "entry.pop('QA_list')]\n"
        "def parse_comprehension(text, deduplicate):\n"
        "    return text.split('</END>')\n"
    )
    options = (
        "--documents",
        "30",
        "--passes",
        "2",
        "--workers",
        "1",
        "--released",
        str(tmp_path),
        str(tmp_path / "report.json"),
    )
    rendering, parser, stage = run_script("rendering.py", *options)
    assert all(
        rate > 0
        for comparison in (rendering, parser)
        for rate in (*comparison.ours, *comparison.theirs)
    )
    assert rendering.peer == parser.peer == "released code"
    assert (len(stage.ours), stage.peer) == (2, "")


def test_loss_against_others(tmp_path):
    options = (
        "--tokens",
        "32",
        "--width",
        "8",
        "--vocabulary",
        "64",
        "--chunk",
        "16",
        "--repeats",
        "2",
        str(tmp_path / "report.json"),
    )
    rows = run_script("loss.py", *options)
    assert {row.peer.partition(" (")[0] for row in rows} >= {
        "plain",
        "torch auto",
        "torch accurate",
        "liger",
    }
    assert {row.unit for row in rows if not row.missing} == {"s", "MiB"}
    assert all(row.less_is_better and row.ratios for row in rows if not row.missing)


def test_every_script_is_there():
    assert all((ROOT / "benchmarks" / script).exists() for script, _, _ in BENCHMARKS.values())
