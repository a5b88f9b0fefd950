import unicodedata

from ipt.corpus.words import UNSPACED, words_of


def test_each_character_belongs_to_a_word_by_its_category():
    """Letters, numbers and marks join their neighbours, except in scripts without spaces."""
    wrong = []
    for code in range(0x80, 0x10000):
        character = unicodedata.normalize("NFKC", chr(code)).lower()
        if len(character) != 1 or not 0x80 <= ord(character) < 0x10000:
            continue
        words = words_of(f"a{character}q")
        composed = unicodedata.normalize("NFKC", f"a{character}q")
        if unicodedata.category(character)[0] not in "LNM":
            expected = ["a", "q"]
        elif any(ord(character) in script for script in UNSPACED):
            expected = ["a", character, "q"]
        else:
            expected = [composed]
        if words != expected:
            wrong.append((hex(code), words, expected))
    assert not wrong


def test_marks_belong_to_words():
    assert words_of("हिन्दी शब्द") == ["हिन्दी", "शब्द"]
    assert words_of("日本 Größe_a") == ["日", "本", "größe", "a"]
