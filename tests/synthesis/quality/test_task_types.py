import pytest

from ipt.corpus.words import words_of
from ipt.synthesis.quality.task_types import KINDS, kind_of

CASES = {
    "step_by_step": [
        (
            "How many are left?\nLet's think step by step.",
            "Two of three.\nTherefore, the answer is 1",
        )
    ],
    "multiple_choice": [
        ("Which organ?\nOptions:\n- heart\n- lung", "heart"),
        ("Why?\n(A) yes\n(B) no", "A"),
        ("Why?\nA. x\nB. y", "A"),
    ],
    "yes_no": [
        ("Is the heart a muscle?", "Yes, it is."),
        ("Does it filter blood?", "It does not."),
        ("Anybody there?", "No"),
    ],
    "true_false": [
        ("True or false: the heart is a muscle.", "True"),
        ("The heart is a muscle.", "false"),
    ],
    "inference": [("Can we conclude that the heart moves?", "Yes")],
    "summary": [("What is the main idea of the text?", "Hearts"), ("Summarize it.", "Hearts")],
    "paraphrase": [("Paraphrase the first sentence.", "The heart moves blood.")],
    "translation": [("Translate the title to French.", "Coeur")],
    "completion": [
        ("The heart pumps ___.", "blood"),
        ("Fill in the blank: the heart pumps", "blood"),
    ],
    "classification": [
        ("Which category does it belong to?", "muscle"),
        ("What is the sentiment of the review?", "good"),
    ],
    "comparison": [
        ("What is the difference between a vein and an artery?", "Direction"),
        ("How do veins differ from arteries?", "They do"),
    ],
    "calculation": [("Calculate the mean.", "3")],
    "code": [("Write a function that sorts.", "def f")],
    "cause": [
        ("Why does it stop?", "Age"),
        ("What is the main cause of it?", "Age"),
        ("What are the causes of it?", "Age"),
    ],
    "number": [("How many chambers has it?", "Four"), ("For how long does it beat?", "For life")],
    "time": [("When was it found?", "1628"), ("In what year was it found?", "1628")],
    "place": [("Where is it?", "In the chest"), ("In which country was it found?", "England")],
    "person": [("Who found it?", "Harvey"), ("By whom was it found?", "Harvey")],
    "procedure": [("How do you take a pulse?", "Count"), ("What steps are taken?", "Two")],
    "manner": [("How is it inherited?", "By chance")],
    "list": [("List the chambers.", "Four"), ("What are some symptoms?", "Pain")],
    "naming": [
        ("What is the name of a muscle that pumps blood?", "heart"),
        ("What is a muscle that pumps called?", "heart"),
    ],
    "definition": [
        ("What is the heart?", "A muscle"),
        ("What does angina mean?", "Pain"),
        ("Define angina.", "Pain"),
    ],
    "fact": [
        ("What is the capital of France?", "Paris"),
        ("Which organ pumps blood?", "heart"),
        ("What does the heart do?", "It pumps"),
    ],
    "instruction": [("Explain the circulation.", "It goes round.")],
    "other": [("心臓は何ですか", "筋肉"), ("", ""), ("Is it red or blue?", "Red")],
}


def test_every_kind_has_a_case():
    assert set(CASES) == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "question", "answer"),
    [(kind, *pair) for kind, pairs in CASES.items() for pair in pairs],
)
def test_kind(kind, question, answer):
    assert kind_of(question, answer, words_of(question), words_of(answer)) == kind
