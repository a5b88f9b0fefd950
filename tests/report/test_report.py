import base64
import csv
import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.evaluation.results import compare
from ipt.rendering.run import SCHEMA as TEXT_SCHEMA
from ipt.report.formatting import duration
from ipt.report.html import write_report
from ipt.report.measures import measure_of
from ipt.report.plot_style import PALETTE
from ipt.report.scores import Arm, Difference
from ipt.synthesis.shards import SCHEMA as PAIR_SCHEMA
from tests.report.report_cases import Page, evaluation, training

HOSTILE = "</p><script>alert('pair')</script><img src=x onerror=alert(1)>"


# A small run that has everything
# ----------------------------------------------------------------------------------------------


def stage_with_pairs(folder: Path) -> Path:
    row = {
        "chain_id": 0,
        "round": 0,
        "inherits_previous": False,
        "finish_reason": "stop",
        "prompt_tokens": 9,
        "output_tokens": 9,
        "raw_output": "",
    }
    pair = {"question": f"What is a stroma? {HOSTILE}", "answer": f"A supporting tissue. {HOSTILE}"}
    rows = [
        {
            **row,
            "doc_id": f"UBERON:{HOSTILE}",
            "text": f"The stroma {HOSTILE} " + "supports. " * 3000,
            "pairs": [pair],
        }
    ]
    rows += [{**row, "doc_id": "empty", "text": "No pairs came from here.", "pairs": []}]
    (folder / "pairs").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=PAIR_SCHEMA), folder / "pairs" / "part-00000.parquet"
    )
    return folder


def stage_with_texts(folder: Path) -> Path:
    row = {
        "id": "chain-0",
        "text": f"Document {HOSTILE}\n\nQuestion and answer",
        "source": "instruction",
        "n_shots": 2,
        "n_pairs": 3,
        "layout": "plain",
    }
    (folder / "texts").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist([row], schema=TEXT_SCHEMA), folder / "texts" / "part-00000.parquet"
    )
    return folder


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> list[Arm]:
    folder = tmp_path_factory.mktemp("stages")
    return [
        Arm("start", None, evaluation(folder / "evaluation-start", 0.25, 3.0)),
        Arm(
            "vanilla",
            training(folder / "vanilla", {"raw": 1.0}),
            evaluation(folder / "evaluation-vanilla", 0.3, 2.0),
        ),
        Arm(
            "instruct",
            training(folder / "instruct", {"raw": 0.5, "instruction": 0.5}),
            evaluation(folder / "evaluation-instruct", 0.9, 2.5),
        ),
    ]


QUALITY = {
    "grounded_rate": 0.925,
    "frames": {f"what is _ {HOSTILE}": 4},
    "rejected": {"truncated": 7},
    "unheard_of": 1234,
    "filtered": {"grounded": 3},
    "rewrites": 0,
    "generator_flops": 1_234_567_890,
    "kinds": {"definition": 30, "yes_no": 10},
    "histograms": {
        "question_words": {"edges": [0, 5, 6], "counts": [1, 0, 3]},
        "pairs_per_row": {"edges": [0, 1], "counts": [2, 2]},
    },
    "diversity": {
        "pairs_sampled": 40,
        "questions_compared": 40,
        "self_bleu": 0.25,
        "distinct_4grams": 0.5,
    },
    "judge": {
        "judged": 500,
        "failed": {},
        "accuracy": 0.775,
        "accuracy_ci95": [0.7363, 0.8094],
        "relevance": None,
        "kinds_of_task": 49,
    },
    "overlap": {
        "is_a_recall": {
            "items": 100,
            "items_found": 2,
            "items_too_short_to_look_for": 5,
            "texts_that_overlap": 1,
        }
    },
}


@pytest.fixture(scope="module")
def inputs(arms, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inputs")
    stages = [
        {
            "name": "corpus",
            "folder": "stages/corpus",
            "seconds": 3.25,
            "reused": True,
            "stats": {"documents": 2, "note": HOSTILE},
        },
        {
            "name": "synthesis",
            "folder": "stages/synthesis",
            "seconds": 192.0,
            "reused": False,
            "stats": {},
        },
    ]
    return {
        "title": f"Tissues {HOSTILE}",
        "config_yaml": f"name: tissues  # {HOSTILE}\n",
        "arms": arms,
        "pairs": stage_with_pairs(folder / "synthesis"),
        "texts": stage_with_texts(folder / "rendering"),
        "stages": stages,
        "quality": QUALITY,
        "facts": {
            "model": "embedded:tiny",
            "seed": 0,
            "hardware": {"cpus": 2, "gpus": []},
            "command": f"reproduce {HOSTILE}",
            "versions": {"torch": "2.13"},
        },
    }


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("report")
    return folder, write_report(folder, **inputs)


@pytest.fixture(scope="module")
def output(written) -> Path:
    return written[0]


@pytest.fixture(scope="module")
def page(output) -> Page:
    return Page(output / "report.html")


@pytest.fixture(scope="module")
def table(output) -> list[dict]:
    with (output / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# The page
# ----------------------------------------------------------------------------------------------


def test_tags_are_balanced_and_names_are_unique(page):
    assert page.source.startswith("<!DOCTYPE html>")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) > 10 and len(set(ids)) == len(ids)
    targets = {attributes["href"] for tag, attributes in page.tags if tag in ("a", "use")} | set(
        re.findall(r"url\((#[^)]*)\)", page.source)
    )
    assert len(targets) > 10 and {target.removeprefix("#") for target in targets} <= set(ids)


def test_nothing_comes_from_the_network(page):
    assert "://" not in page.source
    assert not re.search(r"@import|url\((?!#)|//[a-z]+\.[a-z]", page.source.replace(HOSTILE, ""))
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"img", "iframe", "object", "embed", "base", "form"}
    )
    assert all(
        name not in attributes
        for _, attributes in page.tags
        for name in ("src", "srcset", "data", "action")
    )
    assert [attributes["href"] for tag, attributes in page.tags if tag == "link"] == ["data:,"]


def test_the_only_script_is_ours_and_the_policy_names_it(page):
    scripts = page.texts["script"]
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1 and "aria-sort" in "".join(
        scripts
    )
    policy = next(
        attributes["content"]
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256("".join(scripts).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_model_output_is_shown_as_text(page):
    """Where the parser sees the hostile string as text, it is inert; where it saw tags, the two
    tests above fail.
    """
    shown = page.text().count("<script>alert('pair')</script>")
    # title, command, document's name and text, question, answer, rendered text, templates, stage
    # statistics, config
    assert shown >= 9
    assert page.text("title").startswith("Tissues </p><script>")


def test_headings_tables_and_pictures_can_be_heard(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and all(below - above <= 1 for above, below in pairwise(levels))
    counts = {tag: [t for t, _ in page.tags].count(tag) for tag in ("table", "caption", "thead")}
    assert counts["table"] == counts["caption"] == counts["thead"] == 5
    assert all(
        attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th"
    )
    pictures = [
        attributes
        for tag, attributes in page.tags
        if tag == "svg" and "aria-hidden" not in attributes
    ]
    assert len(pictures) == 7 and all(
        attributes["role"] == "img" and len(attributes["aria-label"]) > 30
        for attributes in pictures
    )
    assert any(
        "instruct instruction 1,280 tokens" in attributes["aria-label"] for attributes in pictures
    )


def test_figures_follow_the_readers_colours(page, output):
    figures = "".join(re.findall(r"<figure>.*?</figure>", page.source, flags=re.DOTALL))
    assert {
        f"var(--{role})"
        for role in ("ink", "muted", "rule", "bar", "bar-pale", "arm-0", "arm-1", "arm-2")
    } <= set(re.findall(r"var\([^)]*\)", figures))
    assert re.findall(r"(?:fill|stroke): #\w+", figures) == []
    for name in ("losses", "scores", "sources", "lengths", "kinds", "stages"):
        assert (output / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", [0, 1])
def test_colours_have_contrast(page, mode):
    card, wash = (
        re.findall(rf"--{name}: (#\w{{6}})", page.source)[mode] for name in ("card", "wash")
    )
    washes = [
        re.findall(rf"--{name}: (#\w{{6}})", page.source)[mode]
        for name in ("good", "good-wash", "bad", "bad-wash")
    ]
    inks = [
        colours[mode]
        for role, colours in PALETTE.items()
        if role in ("ink", "muted") or role.startswith("arm")
    ]
    assert len(inks) == 9
    for ink, ground in [
        *((ink, ground) for ink in inks for ground in (card, wash)),
        (washes[0], washes[1]),
        (washes[2], washes[3]),
    ]:
        assert contrast(ink, ground) >= 4.5, (ink, ground)


# Severe protanopia, deuteranopia and tritanopia in linear RGB (Machado, Oliveira and Fernandes
# 2009).
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Linear RGB to Oklab (Ottosson 2020): in that space distances are about as large as they look.
CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_arms_can_be_told_apart(mode, blindness):
    arms = [linear(colours[mode]) for role, colours in PALETTE.items() if role.startswith("arm")]
    seen = [OKLAB @ np.cbrt(CONES @ np.clip(BLINDNESS[blindness] @ arm, 0, 1)) for arm in arms]
    distances = {
        (i, j): float(np.linalg.norm(a - b))
        for i, a in enumerate(seen)
        for j, b in enumerate(seen)
        if i < j
    }
    assert len(distances) == 21 and min(distances.values()) > 0.07
    # the start and three arms, the usual case
    assert min(distance for (_, j), distance in distances.items() if j < 4) > 0.12


def contrast(a: str, b: str) -> float:
    """WCAG 2.2 contrast ratio of two colours."""
    lighter, darker = sorted(
        (float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (a, b)), reverse=True
    )
    return (lighter + 0.05) / (darker + 0.05)


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def test_the_first_paragraph_names_models_tokens_and_tasks(page):
    assert (
        "Two models (vanilla, instruct) were trained on 2,560 tokens each and compared with the "
        "base model (start) on 3 tasks. Differences are relative to vanilla." in page.text()
    )


# The figures
# ----------------------------------------------------------------------------------------------


def test_quality_figures_say_their_numbers(page):
    labels = [
        attributes["aria-label"]
        for tag, attributes in page.tags
        if tag == "svg" and "aria-label" in attributes
    ]
    assert "Pairs by task type: definition 30, yes no 10." in labels
    assert (
        "Distribution of lengths: words per question 0–4: 25%, 6+: 75%; pairs per document 0: "
        "50%, 1+: 50%." in labels
    )


def test_every_score_is_shown_as_it_was_measured(page, arms):
    shown = {(row[0][0], row[1][0], row[2][0]): row for row in page.rows("All scores")}
    expected = 0
    for arm in arms:
        for task, metrics in json.loads((arm.evaluation / "results.json").read_text()).items():
            for metric, entry in metrics.items():
                row = shown[(words(task), measure_of(metric).label, arm.name)]
                assert (
                    float(row[3][1]) == entry["value"]
                    and float(row[4][1]) == entry["ci95"][0]
                    and int(row[5][1]) == entry["n"]
                )
                expected += 1
    assert len(shown) == expected == 57


def words(task: str) -> str:
    return {
        "definition_to_term_recall": "definition to term, recall",
        "held_out_perplexity": "held-out perplexity",
    }.get(task, "definition to term, generalisation")


def test_the_verdict_says_what_the_intervals_allow(page):
    rows = page.rows("Main measures")
    recall, generalisation, documents = rows[0], rows[2], rows[4]
    assert [cell[0].split(" ")[0] for cell in recall[2:5]] == ["25.0%", "30.0%", "90.0%"]
    assert [float(cell[1]) for cell in recall[2:5]] == [0.25, 0.3, 0.9]
    assert "chance: 25.0%" in recall[1][0]
    assert recall[5][0].startswith("+60.0 points") and recall[5][0].endswith("▲ better")
    assert generalisation[5][0].startswith("0.0 points") and generalisation[5][0].endswith(
        "○ not significant"
    )
    assert documents[1][0].startswith("bits per byte") and documents[5][0].endswith("▼ worse")
    assert (
        "instruct compared with vanilla on 5 main measures: better on 1 , worse on 1 , no "
        "significant difference on 3 ." in spaced(page.text())
    )
    assert "Differences are paired: both models answered" in page.text()
    assert "Better: definition to term, recall (accuracy +60.0 points)." in page.text()


def spaced(text: str) -> str:
    return re.sub(r"\s*([,.])\s", r" \1 ", text)


def test_a_difference_of_the_start_is_turned_around(page):
    assert (
        "vanilla compared with start on 5 main measures: better on 1 , no significant difference "
        "on 4 ." in spaced(page.text())
    )


def test_results_csv_holds_full_precision_and_the_paired_differences(table, arms):
    by_name = {arm.name: arm for arm in arms}
    results = {
        name: json.loads((arm.evaluation / "results.json").read_text())
        for name, arm in by_name.items()
    }
    assert len(table) == 57
    for row in table:
        entry = results[row["arm"]][row["task"]][row["metric"]]
        assert [float(row["value"]), float(row["stderr"])] == [entry["value"], entry["stderr"]]
        assert [float(row["ci95_low"]), float(row["ci95_high"])] == entry["ci95"] and int(
            row["n"]
        ) == entry["n"]
        if row["arm"] == "vanilla":
            assert row["difference"] == row["baseline"] == ""
            continue
        paired = compare(by_name[row["arm"]].evaluation, by_name["vanilla"].evaluation)[
            row["task"]
        ][row["metric"]]
        assert row["baseline"] == "vanilla" and float(row["difference_p"]) == paired["p"]
        assert float(row["difference"]) == paired["difference"]
        assert float(row["difference"]) == pytest.approx(
            entry["value"] - results["vanilla"][row["task"]][row["metric"]]["value"]
        )
        assert [float(row["difference_ci95_low"]), float(row["difference_ci95_high"])] == paired[
            "ci95"
        ]


def test_the_other_tables(page):
    sources = [[cell[0] for cell in row] for row in page.rows("Tokens per source")]
    assert sources[2] == [
        "instruct",
        "instruction",
        "50.000%",
        "50.000%",
        "1,280",
        "1,000",
        "1.28",
        "3",
    ]
    training_table = {
        heading[0]: cell[0] for heading, cell in zip(*page.tables["Training runs"][:2], strict=True)
    }
    assert training_table["Tokens/s, median"] == "120" and training_table["Time"] == "0:01:15"
    assert training_table["First loss"] == "3.975" and training_table["Final loss"] == "3.000"
    assert "MFU, median" not in training_table  # no arm knows it
    quality = {row[0][0]: row[1][0] for row in page.rows("Synthesis quality")}
    assert (
        quality["Grounded answers at least 80% of the words of the answer occur in the document"]
        == "92.5%"
    )
    assert (
        quality["Rejected pieces parts of generations that are not pairs, by reason"]
        == "truncated: 7"
        and quality["Unheard of"] == "1,234"
    )
    assert (
        quality["Generator FLOPs 2 × parameters × (uncached prompt + generated tokens)"]
        == "1.23e+09"
    )
    assert (
        quality["Correct answers according to a judge model, on a random sample"]
        == "77.5% (95% CI: 73.6% to 80.9%; 500 pairs)"
    )
    assert quality["Task types assigned by the judge model"] == "49"
    assert quality["Distinct 4-grams among all 4-grams of the sampled pairs"] == "50.0%"
    assert quality["Filtered pairs by the first filter that removed them"] == "grounded: 3"
    overlap = [name for name in quality if name.startswith("Overlap with is-a, recall")]
    assert quality[overlap[0]] == "2 of 100 items, in 1 pair" and "5 were too short" in overlap[0]
    assert not [name for name in quality if "rewrite" in name]  # there were none


def test_long_texts_are_folded_and_the_cut_is_counted(page):
    folded = re.search(r"Show ([\d,]+) more characters", page.text())
    left_out = re.search(r"([\d,]+) more characters not shown", page.text())
    shown = re.search(r'<p class="text">(The stroma.*?)…</p>', page.source, flags=re.DOTALL)
    assert folded and left_out and shown
    visible = len(shown.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&#39;", "'"))
    total = len(f"The stroma {HOSTILE} " + "supports. " * 3000)
    assert (
        visible + int(folded.group(1).replace(",", "")) + int(left_out.group(1).replace(",", ""))
        == total
    )


# What may be missing
# ----------------------------------------------------------------------------------------------


def write_bare(output: Path, arms: list[Arm]) -> Page:
    write_report(
        output,
        title="Bare",
        config_yaml="",
        arms=arms,
        pairs=None,
        texts=None,
        stages=[],
        quality={},
        facts={},
    )
    return Page(output / "report.html")


def test_one_arm_and_nothing_else(tmp_path, arms):
    page = write_bare(tmp_path, arms[:1])
    assert (
        "One model (start) was evaluated on 3 tasks. No model was trained in this run."
        in page.text()
    )
    assert set(page.tables) == {"Main measures", "All scores"}
    assert "difference" not in page.text("table").lower()
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["scores.png"]


def test_without_predictions_there_is_no_interval_of_a_difference(tmp_path):
    arms = []
    for name, value in (("start", 0.2), ("vanilla", 0.5), ("instruct", 0.7)):
        folder = tmp_path / name
        folder.mkdir()
        entry = {"value": value, "stderr": None, "ci95": [None, None], "n": 1}
        (folder / "results.json").write_text(
            json.dumps({"quiz": {"accuracy": entry, "novelty": {**entry, "value": None}}})
        )
        arms.append(Arm(name, None if name == "start" else tmp_path / "no-training-files", folder))
    page = write_bare(tmp_path / "report", arms)
    verdict = page.rows("Main measures")[0]
    assert verdict[5][0].startswith("+20.0 points") and verdict[5][0].endswith("no interval")
    assert (
        "Differences are paired" not in page.text()
        and "▲" not in page.text()
        and "no paired interval for 1" in page.text()
    )
    assert "fewer than 30 items" in page.text()


def test_without_a_vanilla_the_first_trained_arm_is_the_baseline(tmp_path, arms):
    renamed = [
        arms[0],
        Arm("half", tmp_path, arms[2].evaluation),
        Arm("plain", tmp_path, arms[1].evaluation),
    ]
    page = write_bare(tmp_path, renamed)
    assert "Differences are relative to half." in page.text()


def test_the_same_inputs_give_the_same_bytes(tmp_path, inputs, output):
    write_report(tmp_path, **inputs)
    for name in ("report.html", "results.csv", "figures/scores.png", "figures/losses.png"):
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes(), name


def test_statistics_count_what_was_written(written):
    statistics = written[1]
    assert statistics == {
        "arms": 3,
        "runs": 3,
        "tasks": 3,
        "scores": 57,
        "figures": ["losses", "training", "scores", "sources", "lengths", "kinds", "stages"],
        "main_differences": {"better": 1, "not significant": 3, "worse": 1},
    }
    json.dumps(statistics)


def test_wrong_arms_are_refused_in_one_line(tmp_path, arms):
    with pytest.raises(ValueError, match=r"two arms have the same name and seed \(start, seed 0\)"):
        write_bare(tmp_path, [arms[0], arms[0]])
    with pytest.raises(
        FileNotFoundError, match=r"arm lost has no .*results.json: evaluate it first"
    ):
        write_bare(tmp_path, [Arm("lost", None, tmp_path / "nowhere")])


# Readings and numbers
# ----------------------------------------------------------------------------------------------


@given(st.floats(-5, 5), st.floats(0, 5), st.sampled_from([-1, 0, 1]))
def test_readings_mirror_each_other_and_never_overclaim(value, half, better):
    difference = Difference(value, value - half, value + half, None, better)
    mirrored = {"better": "worse", "worse": "better", "higher": "lower", "lower": "higher"}
    assert difference.negated().reading == mirrored.get(difference.reading, difference.reading)
    assert (difference.reading == "not significant") == (value - half <= 0 <= value + half)
    if better and difference.reading in ("better", "worse"):
        assert (difference.reading == "better") == (value * better > 0)


@pytest.mark.parametrize(
    ("metric", "value", "shown", "signed"),
    [
        ("accuracy", 0.4, "40.0%", "+40.0"),
        ("accuracy", -0.081, "−8.1%", "−8.1"),
        ("logprob", -3.0612, "−3.061", "−3.061"),
        ("perplexity", 1234.56, "1,234.6", "+1,234.6"),
        ("span_f1", 0.5, "50.0%", "+50.0"),
        ("log_likelihood_ratio", 0.25, "0.250", "+0.250"),
        ("logprob", -0.0001, "0.000", "0.000"),
        ("accuracy", 0.0, "0.0%", "0.0"),
    ],
)
def test_values_read_as_their_measure(metric, value, shown, signed):
    assert (measure_of(metric).show(value), measure_of(metric).show(value, signed=True)) == (
        shown,
        signed,
    )


def test_directions_of_measures():
    directions = {
        name: measure_of(name).better
        for name in ("span_f1", "gold_logprob", "token_nll", "perplexity", "novelty")
    }
    assert directions == {
        "span_f1": 1,
        "gold_logprob": 1,
        "token_nll": -1,
        "perplexity": -1,
        "novelty": 0,
    }


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.96, "0:00:10"),
        (59.6, "0:01:00"),
        (192, "0:03:12"),
        (90_000, "1 day, 1:00:00"),
    ],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown
