"""Files that are whole or not there: crashes, full disks, torn and foreign files."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from sgd import files


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch):
    path = files.write_atomic(tmp_path / "a.txt", "old")
    real = os.fsync

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full.*a.txt.*bytes free.*Try") as caught:
        files.write_atomic(path, "new")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(os, "fsync", real)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_while_appending_keeps_the_good_rows(tmp_path, monkeypatch):
    log = files.RowLog(tmp_path / "rows.jsonl", key=lambda r: r["n"])
    log.append({"n": 1})
    real = os.fsync

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full.*rows.jsonl.part"):
        log.append({"n": 2})
    monkeypatch.setattr(os, "fsync", real)
    log.append({"n": 3})
    assert files.read_jsonl(log.seal()) == [{"n": 1}, {"n": 3}]


WRITER = """
import sys
from sgd import files
log = files.RowLog(sys.argv[1], key=lambda r: r["n"])
for n in range(2000):
    if n not in log.done:
        log.append({"n": n, "text": "x" * 200})
log.seal()
"""


def test_killed_at_random_moments_no_row_is_lost_or_doubled(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    seen = 0
    for delay in (0.0, 0.02, 0.05, 0.01, 0.03):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        start = time.time()
        while not path.with_name("rows.jsonl.gz.part").exists() and time.time() - start < 20:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not path.exists():
            rows = files.RowLog(path, key=lambda r: r["n"]).rows
            assert [r["n"] for r in rows] == list(range(len(rows)))
            assert len(rows) >= seen
            seen = len(rows)
    subprocess.run([sys.executable, "-c", WRITER, str(path)], check=True)
    assert [r["n"] for r in files.read_jsonl(path)] == list(range(2000))


# -- a file that was cut anywhere is never taken for done ---------------------------------------

ROWS = [{"task": "boil", "variation": v, "text": "é" * v} for v in range(6)]


def cuts(size):
    "One length of every kind: nothing, inside the header, the middle, the trailer, all but one byte."
    return sorted({0, 1, 5, 12, size // 2, size - 9, size - 8, size - 4, size - 1})


def make(kind, folder):
    "One finished result of each kind, with its sidecar: the path, and the file to damage."
    if kind == "folder":
        path = folder / "student.s0"
        files.write_json(path / "config.json", {"layers": 4})
        files.write_atomic(path / "weights.bin", bytes(range(200)))
        files.write_sidecar(path, "files.toy", {"seed": 0})
        return path, path / "weights.bin"
    name = {"gz": "rows.jsonl.gz", "jsonl": "rows.jsonl", "csv": "table.csv"}[kind]
    path = folder / name
    if kind == "csv":
        files.write_atomic(path, "score,low,high\n" + "1,2,3\n" * 20)
    else:
        files.write_jsonl(path, ROWS)
    files.write_sidecar(path, "files.toy", {"seed": 0})
    return path, path


@pytest.mark.parametrize("kind", ["gz", "jsonl", "csv", "folder"])
def test_a_result_cut_anywhere_is_made_again_and_named(tmp_path, kind):
    path, victim = make(kind, tmp_path)
    whole = victim.read_bytes()
    assert files.is_done(path, "files.toy", {"seed": 0})
    for length in cuts(len(whole)):
        victim.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match=f"{path.name}.*made again"):
            assert not files.is_done(path, "files.toy", {"seed": 0}), length
    victim.write_bytes(whole)
    assert files.is_done(path, "files.toy", {"seed": 0})


def test_a_sidecar_cut_anywhere_is_made_again_and_named(tmp_path):
    path, _ = make("gz", tmp_path)
    beside = files.sidecar_path(path)
    whole = beside.read_bytes()
    for length in [n for n in cuts(len(whole)) if n < len(whole) - 1]:
        beside.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match="rows.json") as caught:
            assert not files.is_done(path, "files.toy", {"seed": 0}), length
        assert any("made again" in str(w.message) for w in caught)


def test_flipped_bytes_and_foreign_files_are_never_done(tmp_path):
    path, _ = make("gz", tmp_path)
    whole = path.read_bytes()
    for at in range(10, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.warns(UserWarning, match="rows.jsonl.gz"):
            assert not files.is_done(path, "files.toy", {"seed": 0})
    files.write_jsonl(path, ROWS)
    assert not files.is_done(path, "files.other", {"seed": 0})
    assert not files.is_done(path, "files.toy", {"seed": 1})
    assert not files.is_done(path, "files.toy", {"seed": 0}, [path])
    assert files.is_done(path, "files.toy", {"seed": 0})


def test_reading_a_cut_file_names_it(tmp_path):
    path = files.write_jsonl(tmp_path / "rows.jsonl.gz", ROWS)
    whole = path.read_bytes()
    for length in cuts(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="rows.jsonl.gz"):
            files.read_jsonl(path)
    plain = files.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    plain.write_bytes(plain.read_bytes()[:-3])
    with pytest.raises(ValueError, match="rows.jsonl.*torn line"):
        files.read_jsonl(plain)


def test_a_part_cut_at_every_byte_keeps_the_whole_rows(tmp_path):
    log = files.RowLog(tmp_path / "rows.jsonl.gz", params={"a": 1})
    for row in ROWS:
        log.append(row)
    whole = log.part.read_bytes()
    for length in range(len(whole) + 1):
        log.part.write_bytes(whole[:length])
        again = files.RowLog(tmp_path / "rows.jsonl.gz", params={"a": 1})
        assert again.rows == ROWS[: whole[:length].count(b"\n")], length
        assert log.part.read_bytes() == whole[: again.size]


def test_a_broken_line_inside_a_part_is_an_error_with_its_number(tmp_path):
    part = tmp_path / "rows.jsonl.part"
    part.write_text('{"task": 1, "variation": 1}\n{"task"\n{"task": 2, "variation": 2}\n')
    with pytest.raises(ValueError, match="rows.jsonl.part, line 2"):
        files.RowLog(tmp_path / "rows.jsonl")


def test_rows_of_other_parameters_are_set_aside(tmp_path):
    log = files.RowLog(tmp_path / "rows.jsonl", params={"cap": 100})
    log.append(ROWS[0])
    with pytest.warns(UserWarning, match="rows.jsonl.part.*other parameters"):
        other = files.RowLog(tmp_path / "rows.jsonl", params={"cap": 300})
    assert other.rows == []
    assert [
        p
        for p in tmp_path.iterdir()
        if ".part" in p.name and p.read_text() == files.to_line(ROWS[0])
    ]


def test_killed_between_sealing_and_sidecar_no_row_is_lost(tmp_path, monkeypatch):
    log = files.RowLog(tmp_path / "rows.jsonl.gz", params={"a": 1})
    log.append(ROWS[0])
    monkeypatch.setattr(files, "write_sidecar", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        log.seal(stage="files.toy", params={"a": 1})
    monkeypatch.undo()
    again = files.RowLog(tmp_path / "rows.jsonl.gz", params={"a": 1})
    assert again.rows == ROWS[:1]
    again.seal(stage="files.toy", params={"a": 1})
    assert files.is_done(log.path, "files.toy", {"a": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.json", "rows.jsonl.gz"]


# -- hashes, places, locks ----------------------------------------------------------------------


def test_hashes_leave_out_time_host_and_commit(tmp_path, monkeypatch):
    path, _ = make("gz", tmp_path)
    first = files.sidecar(path)
    monkeypatch.setattr(files, "provenance", lambda: {"git": {"commit": "other"}, "host": {}})
    files.write_sidecar(path, "files.toy", {"seed": 0}, seconds=99)
    second = files.sidecar(path)
    for key in ("params_sha", "content_sha", "code_sha", "inputs", "stage"):
        assert first[key] == second[key]
    assert files.is_done(path, "files.toy", {"seed": 0})


def test_equal_rows_make_equal_files(tmp_path):
    a = files.write_jsonl(tmp_path / "a.jsonl.gz", ROWS)
    time.sleep(1.1)
    b = files.write_jsonl(tmp_path / "b.jsonl.gz", ROWS)
    assert a.read_bytes() == b.read_bytes()


def test_code_sha_sees_code_and_not_words(tmp_path, monkeypatch):
    package = tmp_path / "sgd"
    package.mkdir()
    monkeypatch.setattr(files, "package_folder", lambda: package)
    (package / "one.py").write_text('"Words."\nfrom .two import f\nX = f(1)\n')
    (package / "two.py").write_text('def f(x):\n    "Old words."\n    return x + 1\n')
    first = files.code_sha("one")
    (package / "two.py").write_text('def f(x):\n    "New words."\n    return x + 1  # why\n')
    assert files.code_sha("sgd.one") == first
    (package / "two.py").write_text("def f(x):\n    return x + 2\n")
    assert files.code_sha("one") != first
    with pytest.raises(ValueError, match="expected a module of sgd, got 'nothing'"):
        files.code_sha("nothing")


def test_paths_in_parameters_are_refused():
    with pytest.raises(TypeError, match="plain JSON.*str"):
        files.json_sha({"path": files.Path("x")})


def test_the_lock_is_free_after_a_kill(tmp_path):
    code = "import sys, time\nfrom sgd.files import Lock\n"
    code += "with Lock(sys.argv[1]):\n    print('in', flush=True)\n    time.sleep(60)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in\n"
    with pytest.raises(RuntimeError, match=f"run in progress: pid {process.pid} on host"):
        files.Lock(tmp_path).__enter__()
    process.kill()
    process.wait()
    with files.Lock(tmp_path):
        pass


def test_a_tree_without_git_is_fine_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nrepo = sgd\n")
    monkeypatch.chdir(tmp_path)
    facts = files.provenance()["git"]
    assert facts["commit"] == "" and "not a git tree" in facts["note"]


def test_a_machine_without_git_is_fine_and_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "not a git tree" in files.provenance()["git"]["note"]


def test_an_editors_hidden_copies_are_no_content(tmp_path):
    files.write_json(tmp_path / "s" / "student.json", {"a": 1})
    before = files.content_sha(tmp_path / "s")
    files.write_json(tmp_path / "s" / ".ipynb_checkpoints" / "student-checkpoint.json", {"a": 2})
    assert files.content_sha(tmp_path / "s") == before
    files.write_json(tmp_path / "s" / "more" / "b.json", {"a": 2})
    assert files.content_sha(tmp_path / "s") != before


def test_a_long_stage_names_the_commit_and_code_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "git_facts", lambda: {"commit": "first"})
    files.at_start.cache_clear()
    assert not files.is_done(tmp_path / "rows.jsonl", "files.toy", {})
    monkeypatch.setattr(files, "git_facts", lambda: {"commit": "later"})
    monkeypatch.setattr(files, "code_sha", lambda module: "later")
    files.write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    made = files.write_sidecar(tmp_path / "rows.jsonl", "files.toy", {})
    files.at_start.cache_clear()
    assert made["git"] == {"commit": "first"} and made["code_sha"] != "later"
