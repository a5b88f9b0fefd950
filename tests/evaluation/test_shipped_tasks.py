"""The tasks that ship: those on raw data read real files, those on a hub a folder with the hub's
columns.
"""

import re
from collections import Counter
from dataclasses import replace

import pytest
import yaml

from ipt.evaluation.__main__ import main
from ipt.evaluation.task import SHIPPED, load_tasks, read_group, sources, task_names
from ipt.evaluation.task_types.registry import kind_of

TERMS = {"anatomy_terms_local": 3190, "finance_terms_local": 463}
CIRCULATION = {
    "circulation_terms_local": 456,
    "circulation_questions_local": 82,
    "urinary_perplexity_local": 11,
}
# task -> items with each right option, as SOURCE.txt of the data counts them; None: the options
# differ by item
CHOICE = {
    "pubmedqa_local": {" yes": 276, " no": 169, " maybe": 55},
    "chemprot_local": {
        " inhibitor": 1255,
        " substrate": 453,
        " indirect downregulator": 340,
        " indirect upregulator": 334,
        " antagonist": 293,
        " activator": 292,
        " product": 191,
        " agonist": 182,
        " downregulator": 72,
        " upregulator": 41,
        " agonist and inhibitor": 12,
        " agonist and activator": 4,
    },
    "mqp_local": {" yes": 1459, " no": 1459},
    "usmle_letters_local": {" A": 353, " B": 309, " C": 346, " D": 265},
    "fiqa_headlines_local": {" negative": 405, " neutral": 154, " positive": 583},
    "fiqa_posts_local": {" negative": 218, " neutral": 30, " positive": 427},
    "boolq_local": {" no": 1237, " yes": 2033},
}
POSITIONS = {  # task -> how often the right option is the first, the second, ...
    "usmle_local": [353, 309, 346, 265],
    "anatomy_questions_local": [175, 190, 185, 164],
    "openbookqa_local": [138, 126, 132, 104],
    "piqa_local": [910, 928],
}
SIZES = {
    "arc_easy_local": 2369,
    **TERMS,
    **CIRCULATION,
    "ner_local": 100,
    "tatqa_local": 699,
    "lambada_local": 5153,
}
ENDS = {  # task -> the end of the first item's text: what the model reads, and the right answer
    "pubmedqa_local": "during programmed cell death?\nAnswer (yes, no or maybe): yes",
    "chemprot_local": "]].\nWhat the marked chemical is to the marked protein: antagonist",
    "mqp_local": "in a 36 year old female?\nDo both ask the same? no",
    "usmle_local": "Tell the attending that he cannot fail to disclose this mistake",
    "usmle_letters_local": "committee\nD. Refuse to dictate the operative report\nAnswer: B",
    "anatomy_questions_local": "structures of the ankle and foot?\nAnswer: regional anatomy",
    "anatomy_terms_local": "the form and composition of the body’s structures\nTerm: anatomy",
    "circulation_terms_local": "there may be partial blockage in another branch\nTerm: anastomosis",
    "circulation_questions_local": "in preventing backflow of blood?\nAnswer: endocardium",
    "urinary_perplexity_local": "the other systems of the body and the quality of one’s life.",
    "finance_terms_local": "the value of a firm in a risky environment\nTerm: business finance",
    "fiqa_headlines_local": "quarter of sales growth\nSentiment about Morrisons: positive",
    "fiqa_posts_local": "one of biggest winners in 2012\nSentiment about FIO: positive",
    "ner_local": "HERBERT SMITH (PER), SILICIUM DE PROVENCE SAS (ORG), EVERGREEN SOLAR (ORG)",
    "tatqa_local": "prepaid expenses and other current assets?\nAnswer in percent: 17.7%",
    "arc_easy_local": "Sunlight is the source of energy for nearly all ecosystems.",
    "piqa_local": "a cage full of a few inches of bedding made of ripped paper"
    " strips, you will also need to supply it with a water bottle and a food dish.",
    "openbookqa_local": "the best way to save money is to quit eating lunch out",
    "boolq_local": "Question: does ethanol take more energy make that produces?\nAnswer: no",
    "lambada_local": "I don't care about signs",
}
LOCAL = sorted(ENDS)


def items_of(name, data_dir):
    (task,) = load_tasks([name], data_dir)
    return task, kind_of(task).read(task, None)


def test_every_local_task_is_in_a_group_and_tested():
    groups = ["medicine_local", "finance_local", "general_local", "circulation_local"]
    assert {task.name for task in load_tasks(groups)} == set(LOCAL)
    assert {name for name in task_names() if name.endswith("_local")} == {*LOCAL, *groups}
    assert set(CHOICE) | set(POSITIONS) | set(SIZES) == set(LOCAL)


@pytest.mark.shared
@pytest.mark.parametrize("name", LOCAL)
def test_items_of_real_data(shared_data, name):
    _, items = items_of(name, shared_data)
    assert items[0].text.endswith(ENDS[name])
    assert len({item.id for item in items}) == len(items)
    if name in CHOICE:
        assert Counter(item.options[item.gold] for item in items) == CHOICE[name]
    elif name in POSITIONS:
        counts = Counter(item.gold for item in items)
        assert [counts[position] for position in range(len(POSITIONS[name]))] == POSITIONS[name]
    else:
        assert len(items) == SIZES[name]


@pytest.mark.shared
def test_demonstrations_of_real_data(shared_data):
    _, items = items_of("chemprot_local", shared_data)
    assert len({item.prompt[: item.shots] for item in items}) == 1
    shown = Counter(re.findall(r"to the marked protein: (.*)", items[0].prompt[: items[0].shots]))
    assert set(shown.values()) == {1} and {f" {name}" for name in shown} == set(items[0].options), (
        "one of each class"
    )
    _, items = items_of("mqp_local", shared_data)
    assert Counter(re.findall(r"ask the same\? (.*)", items[0].prompt[: items[0].shots])) == {
        "yes": 2,
        "no": 2,
    }


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(TERMS))
def test_terms_have_other_terms_of_their_book_beside_them(shared_data, name):
    _, items = items_of(name, shared_data)
    assert all(len({option.lower() for option in item.options}) == 4 for item in items)
    places = Counter(item.gold for item in items)
    assert all(
        abs(count - len(items) / 4) < 4 * (len(items) * 3 / 16) ** 0.5 for count in places.values()
    ), "any place"


# What the hub's columns are: paper section 7.2
# -----------------------------------------------------------------------

CHOSEN = {"id": 0, "input": "Shown.\nAsked?", "options": ["one", "two"], "gold_index": 1}
HUB = {
    "medicine": {
        "PubMedQA": CHOSEN,
        "ChemProt": CHOSEN,
        "RCT": CHOSEN,
        "MQP": CHOSEN,
        "USMLE": CHOSEN,
    },
    "finance": {
        "ConvFinQA": {"id": 0, "input": "How much?", "label": "12.5"},
        "FPB": CHOSEN,
        "FiQA_SA": CHOSEN,
        "Headline": {**CHOSEN, "class_id": 3},
        "NER": {"id": 0, "input": "Who?", "label": "Ann (PER), Acme (ORG)"},
    },
    "law": {
        "SCOTUS": CHOSEN,
        "CaseHOLD": {
            "id": 0,
            "input_options": ["holding a", "holding b"],
            "output": " so held",
            "gold_index": 0,
        },
        "UNFAIR_ToS": {**CHOSEN, "gold_index": [0, 1]},
    },
}
READ = {
    "ConvFinQA": "How much? 12.5",
    "NER": "Who? Ann (PER), Acme (ORG)",
    "CaseHOLD": "holding a so held",
    "UNFAIR_ToS": "Shown.\nAsked? one",
}


@pytest.mark.parametrize("domain", HUB)
def test_published_prompts_are_taken_as_they_stand(hub, domain):
    folder = hub({name: [row] for name, row in HUB[domain].items()})
    tasks = load_tasks([domain])
    assert {task.subset for task in tasks} == set(HUB[domain])
    for task in tasks:
        assert task.data == f"hub:AdaptLLM/{domain}-tasks"
        (item,) = kind_of(task).read(replace(task, data=f"hub:{folder}"), None)
        assert item.text == READ.get(task.subset, "Shown.\nAsked? two")


def test_published_figures():
    """Their means are the averages that the paper prints (Tables 1 to 3)."""
    averages = {
        "medicine": {
            "Llama3-70B": 63.9,
            "Llama3-8B": 53.6,
            "Vanilla PT-8B": 58.4,
            "Instruct PT-8B": 61.3,
        },
        "finance": {
            "Llama3-70B": 71.9,
            "Llama3-8B": 70.1,
            "Vanilla PT-8B": 72.0,
            "Instruct PT-8B": 74.7,
        },
        "general": {"Instruct PT-500M": 46.6, "Instruct PT-1.3B": 49.7},
    }
    for group, models in averages.items():
        tasks = load_tasks([group])
        for model, average in models.items():
            figures = [task.published[model] for task in tasks]
            assert sum(figures) / len(figures) == pytest.approx(average, abs=0.1), (
                f"{group} {model}"
            )
    assert read_group("law").published["AdaptLLM-7B"] == 38.5


def test_all_is_every_task_of_the_paper():
    assert [task.name for task in load_tasks(["all"])] == [
        task.name
        for group in ("medicine", "finance", "law", "general")
        for task in load_tasks([group])
    ]
    assert len(load_tasks(["all"])) == 5 + 5 + 3 + 9


def test_no_file_sets_what_is_so_anyway():
    for path in SHIPPED.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        if "tasks" in content:
            continue
        (task,) = load_tasks([path.stem])
        plain = type(task)("", "")
        assert [
            key for key in content if key != "published" and content[key] == getattr(plain, key)
        ] == []


# The commands
# ----------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    main(list(map(str, arguments)))
    return " ".join(capsys.readouterr().out.split())


def test_the_list_says_whether_data_is_there(tmp_path, capsys):
    (tmp_path / "mqp").mkdir()
    (tmp_path / "mqp" / "mqp.csv").write_text("")
    shown = run(
        capsys, "tasks", "mqp_local", "chemprot_local", "arc_easy", "law", "--data-dir", tmp_path
    )
    assert "mqp_local choice, data:mqp/mqp.csv ✓ Do two medical questions ask the same?" in shown
    assert "data:chemprot/test.txt ✗, data:chemprot/train.txt ✗" in shown
    assert "harness:arc_easy" in shown and "law group: scotus, casehold, unfair_tos" in shown
    everything = run(capsys, "tasks")
    assert all(name in everything for name in task_names())


def test_items_are_shown_as_the_model_reads_them(tmp_path, capsys):
    (tmp_path / "mqp").mkdir()
    pairs = [
        f"{doctor},How {number}?,Why {number}?,{label}\n"
        for number, (doctor, label) in enumerate(["10", "11", "11", "10", "20"])
    ]
    (tmp_path / "mqp" / "mqp.csv").write_text("".join(pairs))
    shown = run(capsys, "show", "mqp_local", 1, "--data-dir", tmp_path)
    assert "mqp_local: 1 items of kind choice" in shown
    assert (
        "First question: How 4? │ │ Second question: Why 4? │ │ "
        "Do both ask the same? │ │ ' yes' │ │ ✓ ' no'" in shown
    )
    with pytest.raises(SystemExit):
        run(capsys, "show", "chemprot_local", "--data-dir", tmp_path)
    assert re.search(
        r"error: task chemprot_local: data file .*test.txt does not exist "
        r"\(it is relative to data_dir=",
        capsys.readouterr().err,
    )


def test_sources_are_all_that_a_task_reads():
    (task,) = load_tasks(["pubmedqa_local"])
    assert [source.data for source in sources(task)] == [
        "data:pubmedqa/ori_pqal.json.gz",
        "data:pubmedqa/test_ground_truth.json",
    ]
    (task,) = load_tasks(["chemprot_local"])
    assert [source.data for source in sources(task)] == [
        "data:chemprot/test.txt",
        "data:chemprot/train.txt",
    ]
