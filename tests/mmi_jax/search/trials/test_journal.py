"""Journal: what was finished is there after any kill; another run's file is refused."""

import pytest

from mmi_jax.search.trials.journal import Journal, read_journal

RUN = {"model": "tiny", "tokens": [1, 2]}


def test_rows_come_back_when_the_file_is_opened_again(tmp_path):
    journal = Journal(tmp_path / "work.jsonl", RUN)
    journal.add({"layer": 0, "error": 0.1 + 0.2})
    journal.add({"layer": 1, "error": 1e-300})
    assert Journal(tmp_path / "work.jsonl", RUN).entries == journal.entries
    assert read_journal(tmp_path / "work.jsonl") == (RUN, journal.entries)
    assert journal.entries[0]["error"] == 0.1 + 0.2


def test_a_file_cut_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "work.jsonl"
    journal = Journal(path, RUN)
    rows = [{"layer": n, "values": [n / 7] * n} for n in range(3)]
    for row in rows:
        journal.add(row)
    whole = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        resumed = Journal(path, RUN)
        assert list(resumed.entries) == rows[: max(sum(end <= cut for end in ends) - 1, 0)]
        for row in rows[len(resumed.entries) :]:
            resumed.add(row)
        assert path.read_bytes() == whole


def test_another_run_is_refused_and_the_difference_named(tmp_path):
    Journal(tmp_path / "work.jsonl", RUN)
    with pytest.raises(ValueError, match='pieces of another run: model was "tiny", is "large"; name another file'):
        Journal(tmp_path / "work.jsonl", RUN | {"model": "large"})


@pytest.mark.parametrize("content", ["hello\n", '{"version": 1}\n', "[1]\n", '{"run": 1}\n{\n', "notes"])
def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="a journal must"):
        Journal(path, RUN)
    assert path.read_text() == content


def test_a_missing_journal_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_journal(tmp_path / "absent.jsonl")
