from ipt.console import WIDE, make_console


def test_without_a_terminal_tables_have_room(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == make_console(stderr=True).width == WIDE
    monkeypatch.setenv("COLUMNS", "70")
    assert make_console().width == 70
