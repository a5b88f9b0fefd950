import pytest

from ipt.synthesis.engines import Generation
from ipt.synthesis.formats.base import Prompt
from ipt.synthesis.shards import Journal

REFUSED = Generation([], "", "error", 0, "this prompt was flagged")
GENERATION = Generation([5, 2], "naïve 心\u2028 text\n", "stop", 3)


def test_what_was_added_is_found_again_for_the_same_prompt_only(tmp_path):
    path = tmp_path / ".journal"
    journal = Journal(path)
    journal.add(4, 1, Prompt([1, 2, 3]), GENERATION)
    journal.close()
    again = Journal(path)
    again.add(4, 2, Prompt([1]), REFUSED)
    again.close()
    again = Journal(path)
    assert again.find(4, 1, Prompt([1, 2, 3])) == GENERATION
    assert again.find(4, 2, Prompt([1])) == REFUSED
    assert again.find(4, 1, Prompt([1, 2, 4])) is None
    assert again.find(4, 0, Prompt([1, 2, 3])) is None
    again.remove()
    assert not path.exists()


def test_a_torn_last_line_is_cut_off_at_any_byte(tmp_path):
    path = tmp_path / ".journal"
    journal = Journal(path)
    journal.add(0, 0, Prompt([1]), GENERATION)
    first = path.stat().st_size
    journal.add(0, 1, Prompt([2]), GENERATION)
    journal.close()
    content = path.read_bytes()
    for end in range(first, len(content)):
        path.write_bytes(content[:end])
        torn = Journal(path)
        assert torn.find(0, 0, Prompt([1])) == GENERATION
        assert torn.find(0, 1, Prompt([2])) is None
        torn.add(0, 1, Prompt([2]), GENERATION)
        torn.close()
        assert path.read_bytes() == content


@pytest.mark.parametrize("place", [0, 12, 60, 150])
def test_a_generation_with_a_changed_byte_is_not_taken_and_the_others_are(tmp_path, caplog, place):
    path = tmp_path / ".journal"
    journal = Journal(path)
    journal.add(0, 0, Prompt([1]), GENERATION)
    journal.add(0, 1, Prompt([2]), GENERATION)
    journal.close()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    damaged = Journal(path)
    assert damaged.find(0, 0, Prompt([1])) is None
    assert damaged.find(0, 1, Prompt([2])) == GENERATION
    assert "1 of 2 generations are damaged and run again" in caplog.text
