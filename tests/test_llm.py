"""The chat client under kills, faults and counts, against a real HTTP endpoint on this machine."""

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import FAULTS, Loopback, some_faults

from sgd import llm as sgd_llm
from sgd.llm import (
    LLM,
    Budget,
    BudgetExceeded,
    EndpointError,
    LLMError,
    NoAnswer,
    NotRecorded,
    Price,
    UnknownPrice,
    batch_line,
    call_key,
    canonical,
    correct,
    judge,
    load_recording,
    most_tokens,
    params_of,
    pico,
    price_of,
    save_recording,
    spread,
    take_reply,
)

PRICE = Price(150_000, 600_000, "a test")
spawn = multiprocessing.get_context("forkserver")
spawn.set_forkserver_preload(["sgd.llm"])


def client(end, store=":memory:", **options):
    options = {"price": PRICE, "known_as": "loopback", "max_tokens": 40, "timeout": 5} | options
    return LLM("loop", end.base_url, store, **options)


def ledger(llm, query="SELECT * FROM ledger"):
    return llm.ledger.store.all(query)


@pytest.fixture(autouse=True)
def quick_waits(monkeypatch):
    monkeypatch.setattr(sgd_llm, "back_off", lambda tried, key: 0.01)


# R2: no two different calls share an answer

plain = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(0, 2) | st.text(max_size=5)
nested = st.recursive(
    plain, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x), max_leaves=4
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=20)}
)
fields = {
    "model": st.text(min_size=1, max_size=8),
    "messages": st.lists(message, min_size=1, max_size=3),
    "temperature": st.floats(0, 2),
    "seed": st.integers(0, 9),
    "max_tokens": st.integers(1, 99),
    "stop": st.lists(st.text(max_size=3), max_size=2),
    "top_p": st.floats(0, 1),
    "response_format": nested,
    "anything_new": nested,
}
bodies = st.fixed_dictionaries(fields)
calls = st.tuples(st.sampled_from(["http://a/v1", "http://b/v1"]), bodies, st.integers(0, 2))


@settings(max_examples=300, deadline=None)
@given(calls, st.data())
def test_any_changed_field_is_a_miss_and_the_same_call_is_a_hit(call, data):
    endpoint, body, sample = call
    key = call_key(endpoint, body, sample)
    assert key == call_key(endpoint, json.loads(canonical(body)), sample)
    assert key == call_key(endpoint, dict(reversed(body.items())), sample)
    name = data.draw(st.sampled_from(sorted(fields)))
    value = data.draw(fields[name])
    if canonical(value) != canonical(body[name]):
        assert call_key(endpoint, body | {name: value}, sample) != key
    assert call_key(endpoint, {k: v for k, v in body.items() if k != name}, sample) != key
    assert call_key(endpoint, body, sample + 1) != key
    assert call_key(endpoint + "/x", body, sample) != key


@settings(max_examples=100, deadline=None)
@given(st.lists(calls, min_size=2, max_size=8))
def test_keys_are_equal_only_for_equal_calls(many):
    seen = {}
    for endpoint, body, sample in many:
        text = canonical([endpoint, dict(sorted(body.items())), sample])
        assert seen.setdefault(call_key(endpoint, body, sample), text) == text


def test_the_store_never_mixes_models_parameters_or_endpoints():
    changes = [{}, {"temperature": 0.5}, {"seed": 1}, {"max_tokens": 41}, {"stop": ["x"]}]
    changes += [{"top_p": 0.5}, {"model": "loop-2"}, {"logit_bias": {"1": 2}}]
    with Loopback(answer=lambda body: canonical(body)[:30]) as end, client(end) as llm:
        for n, change in enumerate(changes):
            assert not llm("same question", **change).cached
            assert llm("same question", **change).cached
            assert len(end.calls) == n + 1
        assert not llm("same question", sample=1).cached
        assert len({row["key"] for row in ledger(llm)}) == len(changes) + 1
        llm.endpoint = "elsewhere"
        assert not llm("same question").cached


def test_what_is_hashed_is_what_is_sent():
    message = [{"role": "user", "content": "ä \u2028 \ud7ff {'x'}", "name": "me"}]
    over = {"stop": ["\n"], "response_format": {"type": "json_object"}, "top_k": 3, "z": None}
    with Loopback() as end, client(end) as llm:
        body = llm.body(message, **over)
        answer = llm(message, **over)
        assert end.calls[0]["body"] == body and "z" not in body
        assert answer.key == call_key("loopback", end.calls[0]["body"])
        assert end.calls[0]["headers"].get("x-stainless-retry-count", "0") == "0"


# R3: a bad answer is an attempt, never an answer

BAD = {
    "429": ("failed", None),
    "500": ("failed", "server error"),
    "503": ("failed", None),
    "400": ("failed", None),
    "hang": ("failed", "cut"),
    "cut": ("failed", "cut"),
    "malformed": ("failed", "malformed"),
    "deep": ("failed", "malformed"),
    "empty": ("empty", None),
    "null": ("empty", None),
    "truncated": ("truncated", None),
    "refused": ("refused", None),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_answer_is_an_attempt_and_never_kept(fault):
    with Loopback(faults=lambda n, body: fault, retry_after="0.01") as end:
        with client(end, tries=2, timeout=0.3 if fault == "hang" else 20) as llm:
            for again in (1, 2):
                with pytest.raises(NoAnswer) as error:
                    llm("boil water and say so at some length, please")
                rows = ledger(llm)
                assert error.value.verdict.state == BAD[fault][0]
                assert [(r["state"], r["flag"]) for r in rows] == [BAD[fault]] * len(rows)
                assert len(rows) == len(end.calls) == again * error.value.tries
                assert ledger(llm, "SELECT * FROM answers") == []
            assert error.value.tries == (1 if fault in ("400", "truncated", "refused") else 2)


@pytest.mark.parametrize("fault", ["usage", "nousage"])
def test_an_answer_with_wrong_counts_is_kept_but_its_tokens_are_not(fault):
    with Loopback(faults={0: fault}) as end, client(end) as llm:
        answer = llm("boil water")
        assert answer.text == "You said: boil water" and answer.tokens_in is None
        assert llm("boil water").cached and len(end.calls) == 1
        (row,) = ledger(llm)
        assert (row["tokens_in"], row["tokens_out"], row["cost"]) == (None, None, None)
        assert row["flag"] == {"usage": "wrong usage", "nousage": "no usage"}[fault]
        assert row["state"] == "answered"
        assert row["held_tokens"] == sum(most_tokens(end.calls[0]["body"]))


def test_half_a_character_in_an_answer_is_replaced_and_the_answer_is_kept(tmp_path):
    store = tmp_path / "calls.sqlite"
    with Loopback(faults=lambda n, body: "surrogate") as end:
        for _ in range(2):
            with client(end, store) as llm:
                assert llm("boil water").text == "You said: boil water \ufffd"
                assert [row["state"] for row in ledger(llm)] == ["answered"]
                assert llm.ledger.total().flagged == 0
                save_recording(llm, tmp_path / "recording.jsonl")
        assert len(end.calls) == 1


anything = st.recursive(
    plain | st.just("\ud800") | st.integers() | st.floats(),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "id model usage choices message content refusal finish_reason "
                "prompt_tokens completion_tokens total_tokens".split()
            ),
            x,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(anything, anything, anything)
def test_no_page_makes_the_judge_raise_or_writes_what_the_ledger_cannot_hold(any, choice, message):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
    choice = {"message": message} | (choice if isinstance(choice, dict) else {})
    for page in (any, {"choices": [any]}, {"choices": [choice], "usage": any, "id": any}):
        verdict = judge(body, json.dumps(page))
        told = verdict.text + verdict.model + verdict.reply_id + verdict.note
        told.encode()
    for text in ("", "[" * 10**5, '{"choices": ' + "[" * 10**5 + "]" * 10**5 + "}"):
        assert judge(body, text).flag == "malformed"


def test_a_row_that_cannot_be_settled_is_settled_as_failed(monkeypatch):
    settle = sgd_llm.Ledger.settle

    def stumble(self, row, verdict, body, latency):
        if "ice" in verdict.text:
            raise OverflowError("too large for the file")
        settle(self, row, verdict, body, latency)

    with Loopback() as end, client(end) as llm:
        monkeypatch.setattr(sgd_llm.Ledger, "settle", stumble)
        results = dict(spread(llm, ["ice", "tin", "\ud83d"], width=1))
        assert isinstance(results[0], NoAnswer) and "too large" in str(results[0])
        assert results[1].text == "You said: tin"
        assert isinstance(results[2], NoAnswer) and "UnicodeEncodeError" in str(results[2])
        rows = ledger(llm)
        assert [(row["state"], row["flag"]) for row in rows] == [
            ("failed", "not written"),
            ("answered", None),
            ("failed", "unexpected"),
        ]
        assert rows[0]["held_tokens"] == rows[0]["most_in"] + rows[0]["most_out"]
        line = {"id": "b", "response": {"status_code": 200, "body": json.loads(page_of("ice"))}}
        with pytest.raises(NoAnswer, match="too large"):
            take_reply(llm, llm.body("more ice"), line)
        assert ledger(llm)[-1]["flag"] == "not written"


def page_of(text):
    usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return json.dumps({"id": "x", "model": "loop", "choices": [choice], "usage": usage})


@pytest.mark.parametrize("width", [1, 4])
def test_another_model_from_the_start_stops_the_run_at_once(width, tmp_path):
    store = tmp_path / "calls.sqlite"
    with Loopback(faults=lambda n, body: "model", latency=0.05) as end:
        for again in (1, 2):
            with client(end, store, width=width) as llm:
                with pytest.raises(
                    EndpointError, match="expected .*loop.*got another-model.*echoes"
                ):
                    list(spread(llm, map(str, range(10)), width))
                rows = ledger(llm)
                assert len(rows) == len(end.calls) <= again * width
                assert {(row["state"], row["flag"]) for row in rows} == {("failed", "wrong model")}
                assert all(row["held_tokens"] == row["most_in"] + row["most_out"] for row in rows)
                assert max(end.bodies().values()) <= again
        paid = len(end.calls)
        with client(end, store, echoes=["another-model"]) as llm:
            assert len(list(spread(llm, map(str, range(10)), width))) == 10
            assert len(end.calls) == paid + 10 and llm("3").model == "another-model"


def test_a_wrong_echo_among_right_ones_is_asked_for_once_more():
    slips = {1: "model", 4: "model", 5: "model"}
    with Loopback(faults=slips) as end, client(end) as llm:
        assert [llm(text).text for text in ("a", "b", "c")][1] == "You said: b"
        with pytest.raises(
            NoAnswer, match="failed after 2 attempts: asked loop, got another-model"
        ):
            llm("d")
        assert len(end.calls) == 6 and llm("d").text == "You said: d"


def test_a_model_that_was_changed_behind_the_endpoint_is_noticed():
    with Loopback(faults=lambda n, body: "model" if n >= 20 else None) as end, client(end) as llm:
        with pytest.raises(EndpointError, match="echoes"):
            list(spread(llm, map(str, range(60)), width=1))
        assert len(end.calls) <= 20 + 8


def test_calls_in_flight_may_show_that_the_first_echo_was_a_slip():
    faults = {0: "model", 1: "slow", 2: "slow"}
    with Loopback(faults=faults, latency=0.3, slow=0.3) as end, client(end, width=3) as llm:
        assert len(list(spread(llm, map(str, range(6)), width=3))) == 6
        assert len(end.calls) == 7


@pytest.mark.parametrize("fault", ["401", "quota"])
def test_an_endpoint_that_refuses_everything_ends_the_run(fault):
    with Loopback(faults=lambda n, body: fault) as end, client(end) as llm:
        with pytest.raises(EndpointError):
            list(spread(llm, map(str, range(200)), width=4))
        assert len(end.calls) <= 8


def test_a_server_that_is_not_there_costs_nothing():
    with Loopback() as end:
        pass
    with client(end, tries=2) as llm:
        with pytest.raises(NoAnswer):
            llm("anybody?")
        assert llm.ledger.total().held == 0 and llm.ledger.total().calls == 2


# waiting, width and shutdown


def test_retry_after_is_obeyed_and_patience_ends_it():
    with Loopback(faults={0: "429", 1: "503"}, retry_after="0.4") as end, client(end) as llm:
        llm("wait")
        first, second, third = (call["at"] for call in end.calls)
        assert second - first >= 0.4 and third - second >= 0.4
    with Loopback(faults={0: "429"}, retry_after="3600") as end, client(end) as llm:
        with pytest.raises(NoAnswer):
            llm("wait")
        assert len(end.calls) == 1


@pytest.mark.parametrize("status", ["429", "503"])
def test_a_date_and_milliseconds_are_obeyed_too(status):
    def date():
        return formatdate(time.time() + 2, usegmt=True)  # whole seconds: between 1 and 2 from now

    for asks, least, most in (
        ({"Retry-After": date}, 1, 20),
        ({"retry-after-ms": lambda: "300"}, 0.3, 20),
        ({"retry-after-ms": lambda: "300", "Retry-After": lambda: "3600"}, 0.3, 20),
    ):
        with Loopback(faults={0: status}, retry_after=asks) as end, client(end) as llm:
            llm("wait")
            first, second = (call["at"] for call in end.calls)
            assert least - 0.05 <= second - first <= most


def test_what_a_header_asks_for():
    def at(seconds, form="%a, %d %b %Y %H:%M:%S GMT"):
        return time.strftime(form, time.gmtime(time.time() + seconds))

    wait = sgd_llm.asked_wait
    assert 58 <= wait({"retry-after": at(60)}) <= 60
    assert 58 <= wait({"retry-after": at(60, "%a, %d %b %Y %H:%M:%S")}) <= 60  # a date is in GMT
    assert wait({"retry-after": at(-60)}) == 0
    assert wait({"retry-after-ms": "1500"}) == 1.5 and wait({"retry-after": " 2 "}) == 2
    assert wait({"retry-after-ms": "soon", "retry-after": "7"}) == 7
    for odd in ("", "soon", "-5", "nan", "inf", "1e3", "²"):
        assert wait({"retry-after": odd}) is None and wait({"retry-after-ms": odd}) is None
    assert wait({}) is None


def test_a_slow_answer_is_one_call():
    with Loopback(faults={0: "slow"}, slow=0.5) as end, client(end) as llm:
        assert llm("slowly").text == "You said: slowly"
        assert len(end.calls) == 1 and ledger(llm)[0]["latency"] >= 0.5


def test_width_is_a_limit_whatever_the_callers_do():
    with Loopback(latency=0.05) as end, client(end, width=3) as llm:
        results = list(spread(llm, map(str, range(24)), width=12))
        assert len(results) == 24 and 2 <= end.widest <= 3


def test_the_same_question_from_many_threads_is_paid_for_once():
    with Loopback(latency=0.1) as end, client(end) as llm:
        answers = [answer for _, answer in spread(llm, ["same"] * 16, width=8)]
        assert len(end.calls) == 1 and len({answer.text for answer in answers}) == 1


def test_closing_wakes_sleepers_and_leaves_no_call_open():
    with Loopback(faults=lambda n, body: "429", retry_after="60") as end:
        llm = client(end)
        raised = []

        def work():
            try:
                llm("wait long")
            except LLMError as error:
                raised.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        while not end.calls:
            time.sleep(0.01)
        time.sleep(0.1)
        llm.close()
        thread.join(5)
        assert not thread.is_alive() and len(raised) == 1


def run(base_url, store, count, width, tokens=None, latency=0):
    """A child's whole life: `count` calls, the exit code tells how it ended."""
    budget = Budget(tokens=tokens)
    try:
        with LLM("loop", base_url, store, PRICE, budget, width, known_as="loopback") as llm:
            for _ in spread(llm, (f"say {n}" for n in range(count)), width, halt=llm.closing):
                pass
    except BudgetExceeded:
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)


def child(*args):
    process = spawn.Process(target=run, args=args)
    process.start()
    return process


def test_ctrl_c_lets_calls_in_flight_land(tmp_path):
    with Loopback(latency=0.3) as end:
        process = child(end.base_url, tmp_path / "a.sqlite", 200, 4)
        while len(end.calls) < 6:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130
        with client(end, tmp_path / "a.sqlite") as llm:
            assert (
                llm.ledger.total().flagged == 0 and llm.ledger.total().calls == len(end.calls) < 100
            )


# R1 and R4: kills


def test_twenty_kills_repeat_at_most_the_calls_in_flight(tmp_path):
    count, width, store = 200, 4, tmp_path / "calls.sqlite"
    rng, repeats = random.Random(1), []
    with Loopback(latency=0.03) as end:
        for kill in range(21):
            before = sum(end.bodies().values()) - len(end.bodies())
            process = child(end.base_url, store, count, width)
            if kill < 20:
                goal = len(end.calls) + rng.randint(1, 12)
                while len(end.calls) < goal and process.is_alive():
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 0.04))
                process.kill()
            process.join(60)
            assert process.exitcode == (-signal.SIGKILL if kill < 20 else 0)
            time.sleep(0.05)
            repeats.append(sum(end.bodies().values()) - len(end.bodies()) - before)
        assert len(end.bodies()) == count
        assert max(repeats) <= width and sum(repeats) > 0
        with client(end, store) as llm:
            balance(llm, end)
            open_rows = [row for row in ledger(llm) if row["state"] == "sent"]
            assert 0 < len(open_rows) <= 20 * width
            assert {row["flag"] for row in open_rows} == {"in flight"}
            assert len(ledger(llm, "SELECT * FROM answers")) == count


def balance(llm, end):
    """The ledger equals the endpoint's books, row by row, over the rows with known usage."""
    sent = {f"chatcmpl-{call['n']}": call for call in end.calls}
    rows = ledger(llm)
    for row in rows:
        if row["flag"] is None and row["status"] == 200:
            usage = sent[row["reply_id"]]["usage"]
            assert row["tokens_in"] == usage["prompt_tokens"]
            assert row["tokens_out"] == usage["completion_tokens"]
            assert row["cost"] == row["tokens_in"] * 150_000 + row["tokens_out"] * 600_000
            assert row["held"] == row["cost"] and row["source"] == "a test"
        elif row["flag"] is None:
            assert row["cost"] == 0 and row["status"] != 200
        else:
            assert row["tokens_in"] is None and row["cost"] is None
            assert row["held_tokens"] == row["most_in"] + row["most_out"]
    ids = [row["reply_id"] for row in rows if row["reply_id"]]
    assert len(ids) == len(set(ids))
    known = [row for row in rows if row["flag"] is None]
    total = llm.ledger.total()
    assert total.tokens_in == sum(row["tokens_in"] for row in known)
    assert total.flagged == len(rows) - len(known)


def test_the_ledger_balances_under_every_fault():
    rule = some_faults(0.4, [f for f in FAULTS if f not in ("401", "quota", "hang")], seed=3)
    with Loopback(faults=rule, retry_after="0.01", slow=0.05) as end, client(end, tries=4) as llm:
        results = [r for _, r in spread(llm, (f"say {n}" for n in range(120)), 6)]
        good = [r for r in results if not isinstance(r, NoAnswer)]
        assert len(results) == 120 and len(good) > 80
        assert len(ledger(llm)) == len(end.calls)
        balance(llm, end)
        rows = [row for row in ledger(llm) if row["flag"] is None]
        sums = [sum(row[f"tokens_{way}"] for row in rows) for way in ("in", "out")]
        assert tuple(sums) == end.billed()
        assert len(ledger(llm, "SELECT * FROM answers")) == len(good)


# R5: the cap


@pytest.mark.parametrize("cap", [99, 100, 150, 700, 1500])
def test_a_cap_is_never_exceeded_and_the_run_goes_on_later(cap, tmp_path):
    store = tmp_path / "calls.sqlite"
    with Loopback(faults=some_faults(0.2, seed=cap), latency=0.005) as end:
        with client(end, store, budget=Budget(tokens=cap), tries=9) as llm:
            with pytest.raises(BudgetExceeded, match="higher cap"):
                list(spread(llm, (f"say {n}" for n in range(200)), 4))
            held = ledger(llm, "SELECT coalesce(sum(held_tokens), 0) AS n FROM ledger")[0]["n"]
            assert held <= cap and sum(end.billed()) <= cap
            assert all(row["state"] != "sent" for row in ledger(llm))
        paid, end.faults = len(ledger_of(store)), lambda n, body: None
        with client(end, store, budget=Budget(tokens=10**6)) as llm:
            assert len(list(spread(llm, (f"say {n}" for n in range(40)), 4))) == 40
            assert len(ledger(llm, "SELECT * FROM answers")) >= 40
        answered = [row["key"] for row in ledger_of(store) if row["state"] == "answered"]
        assert len(answered) == len(set(answered)) and len(ledger_of(store)) >= paid


def ledger_of(store):
    llm = LLM("loop", store=store, offline=True)
    rows = ledger(llm)
    llm.close()
    return rows


def test_a_money_cap_holds_to_the_picodollar():
    with Loopback() as end, client(end) as llm:
        llm("say 1")
        cost, most = llm.ledger.total().cost, ledger(llm, "SELECT most_in, most_out FROM calls")[0]
    most = most["most_in"] * PRICE.tokens_in + most["most_out"] * PRICE.tokens_out
    for slack, passes in ((0, True), (1, False)):
        money = (cost + most - slack) / 10**12
        with Loopback() as end, client(end, budget=Budget(money=f"{money:.12f}")) as llm:
            llm("say 1")
            if passes:
                llm("say 2")
            else:
                with pytest.raises(BudgetExceeded):
                    llm("say 2")
            assert len(end.calls) == 1 + passes


def open_at_once(folder, barrier, count):
    for n in range(count):
        barrier.wait(30)
        sgd_llm.Store(f"{folder}/{n}.sqlite").close()


def test_processes_that_open_a_new_file_at_once_wait_for_each_other(tmp_path):
    barrier = spawn.Barrier(4)
    args = (tmp_path, barrier, 100)
    processes = [spawn.Process(target=open_at_once, args=args) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_store_in_a_file_that_is_no_database_says_so_at_once(tmp_path):
    (tmp_path / "a.sqlite").write_text("no database " * 99)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        sgd_llm.Store(tmp_path / "a.sqlite")


@pytest.mark.parametrize(
    "asked, echoed, same",
    [
        ("gpt-4", "gpt-4-0613", True),
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("qwen", "qwen:latest", True),
        ("gpt-4", "gpt-4-32k", False),
        ("gpt-3.5-turbo", "gpt-3.5-turbo-16k", False),
        ("gpt-4", "gpt-4-1106-preview", False),
    ],
)
def test_a_snapshot_is_the_same_model_and_a_longer_context_is_not(asked, echoed, same):
    assert sgd_llm.same_model(asked, echoed) is same


def test_a_cap_that_is_no_whole_number_of_picodollars_is_rounded_down():
    Budget(money=0.1 + 0.2).check(0, 0, 1, 3 * 10**11)
    with pytest.raises(BudgetExceeded):
        Budget(money=0.1 + 0.2).check(0, 0, 1, 3 * 10**11 + 1)


def test_two_processes_share_one_cap_and_exit_unhappily(tmp_path):
    with Loopback(latency=0.01) as end:
        args = (end.base_url, tmp_path / "calls.sqlite", 300, 2, 2600)
        both = [child(*args) for _ in range(2)]
        for process in both:
            process.join(60)
        assert [process.exitcode for process in both] == [3, 3]
        with client(end, tmp_path / "calls.sqlite") as llm:
            held = ledger(llm, "SELECT sum(held_tokens) AS n FROM ledger")[0]["n"]
            assert sum(end.billed()) <= held <= 2600 and llm.ledger.total().calls > 50


def test_a_bill_can_be_entered_by_hand():
    with Loopback(faults={0: "cut"}) as end, client(end) as llm:
        llm("say 1")
        (row,) = ledger(llm, "SELECT * FROM ledger WHERE flag IS NOT NULL")
        correct(llm.ledger.store, row["id"], 2, 0)
        assert (
            llm.ledger.total().flagged == 0 and llm.ledger.total().held == llm.ledger.total().cost
        )


# prices, recordings, batches


def test_prices_are_exact_or_refused(tmp_path):
    assert pico("0.15", 10**6) == 150_000 and pico(2.5, 10**6) == 2_500_000
    with pytest.raises(ValueError, match="whole picodollars"):
        pico(1.23456789, 10**6)
    sheet = tmp_path / "prices.yaml"
    sheet.write_text(
        "{date: 2026-11-22, currency: USD, per: 1000000, models: {a: {in: 1, out: 2}}}"
    )
    assert price_of("a", sheet)[:2] == (1_000_000, 2_000_000)
    with pytest.raises(UnknownPrice, match="known: a.*Try price="):
        price_of("a-2026-01-01", sheet)


def test_no_row_is_booked_at_an_invented_price(tmp_path):
    line = {"id": "b", "response": {"status_code": 200, "body": json.loads(page_of("ok"))}}
    with pytest.raises(UnknownPrice):
        LLM("loop", store=tmp_path / "online.sqlite")
    with LLM("loop", store=tmp_path / "calls.sqlite", offline=True) as llm:
        assert batch_line("one", llm.body("say"))["body"]["model"] == "loop"
        with pytest.raises(UnknownPrice, match="expected a model of prices.yaml.*price="):
            take_reply(llm, llm.body("say"), line)
        with pytest.raises(UnknownPrice):
            llm.ledger.price
        assert ledger(llm) == ledger(llm, "SELECT * FROM answers") == []
    line["response"]["body"]["model"] = "gpt-4o-mini"
    with LLM("gpt-4o-mini", offline=True) as llm:
        answer, listed = take_reply(llm, llm.body("say"), line), price_of("gpt-4o-mini")
        assert answer.cost == 2 * listed.tokens_in + listed.tokens_out == llm.ledger.total().cost
        assert "list price" in ledger(llm)[0]["source"]
        with pytest.raises(UnknownPrice):
            take_reply(llm, llm.body("say", model="loop"), line)


def test_batches_are_booked_at_the_sheets_batch_rate_or_at_the_price_told(tmp_path):
    sheet = tmp_path / "prices.yaml"
    models = "{loop: {in: 0.5, out: 1.5, batch: 0.5, source: here}}"
    sheet.write_text("{date: 2026-11-22, currency: USD, per: 1000000, models: %s}" % models)
    assert price_of("loop", sheet, batch=True)[:2] == (250_000, 750_000)
    assert price_of("loop", sheet)[:2] == (500_000, 1_500_000)
    line = {"id": "b", "response": {"status_code": 200, "body": json.loads(page_of("ok"))}}
    for price, cost in ((None, 2 * 250_000 + 750_000), (Price(3, 5, "told"), 11)):
        with LLM("loop", offline=True, price=price) as llm:
            llm.ledger.rates.sheet = sheet
            assert take_reply(llm, llm.body("say"), line).cost == cost
            assert llm.ledger.total().cost == cost
            assert ledger(llm)[0]["source"] == ("told" if price else "here, 2026-11-22, batch x0.5")


# every field of a body can be set, and left out


def test_any_field_can_be_set_or_left_out_for_a_client_or_a_call():
    with Loopback() as end:
        with client(end, temperature=0.7, seed=3, top_p=0.5, logprobs=True) as llm:
            llm("one")
            sent = {k: v for k, v in end.calls[-1]["body"].items() if k != "messages"}
            told = {"temperature": 0.7, "seed": 3, "top_p": 0.5, "logprobs": True}
            assert sent == {"model": "loop", "max_tokens": 40} | told
            llm("one", temperature=None, max_completion_tokens=30, store=True)
            assert "temperature" not in end.calls[-1]["body"]
            assert "max_tokens" not in end.calls[-1]["body"] and end.calls[-1]["body"]["store"]
        bare = {"temperature": None, "seed": None, "max_tokens": None, "max_completion_tokens": 9}
        with client(end, **bare, extra={"store": False, "timeout": 3}) as llm:
            llm("two")
            names = {"model", "messages", "max_completion_tokens", "store", "timeout"}
            assert set(end.calls[-1]["body"]) == names
            llm("two", max_tokens=8)
            assert set(end.calls[-1]["body"]) == names - {"max_completion_tokens"} | {"max_tokens"}
            assert [row["most_out"] for row in ledger(llm)] == [9, 8]
            body = end.calls[0]["body"]
            with LLM("loop", offline=True, extra=params_of(end.calls[2]["body"])) as again:
                assert again.body("two") == end.calls[2]["body"]
            with LLM("loop", offline=True, extra=params_of(body)) as again:
                assert again.body("one") == body
    with pytest.raises(ValueError, match="max_completion_tokens of 1 or more, got None"):
        LLM("loop", offline=True, max_tokens=None).body("no limit")
    both = {"max_tokens": 70, "max_completion_tokens": 9}
    assert most_tokens(LLM("loop", offline=True, **both).body("x"))[1] == 70


def test_a_recording_replays_without_a_network_and_refuses_edits(tmp_path):
    path = tmp_path / "rec.jsonl"
    with Loopback() as end, client(end) as llm:
        texts = [llm("say", sample=n).text for n in range(3)]
        save_recording(llm, path)
    offline = dict(known_as="loopback", offline=True, max_tokens=40)
    with LLM("loop", **offline) as llm:
        assert load_recording(llm, path) == 3
        assert [llm("say", sample=n).text for n in range(3)] == texts
        assert llm.ledger.total().calls == 0
        with pytest.raises(NotRecorded):
            llm("say", sample=3)
    path.write_text(path.read_text().replace('"say"', '"sing"', 1))
    with LLM("loop", **offline) as llm, pytest.raises(ValueError, match="line .* edited"):
        load_recording(llm, path)


def test_batch_replies_count_once_in_any_order():
    with Loopback() as end, client(end) as llm:
        bodies = {f"id{n}": llm.body(f"say {n}") for n in range(6)}
        requests = [batch_line(name, body) for name, body in bodies.items()]
        assert {request["url"] for request in requests} == {"/v1/chat/completions"}
        usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
        choice = {"message": {"content": "ok"}, "finish_reason": "stop"}
        page = {"model": "loop", "choices": [choice], "usage": usage}
        lines = [
            {"custom_id": name, "response": {"status_code": 200, "body": page | {"id": name}}}
            for name in bodies
        ]
        lines[4]["response"]["status_code"] = 500
        random.Random(0).shuffle(lines)
        for line in lines * 2:
            try:
                take_reply(llm, bodies[line["custom_id"]], line)
            except NoAnswer:
                assert line["response"]["status_code"] == 500
        spent = llm.ledger.total()
        assert (spent.calls, spent.tokens_in, spent.flagged) == (6, 10, 0)
        assert llm("say 0").cached and not llm("say 4").cached and len(end.calls) == 1


def test_a_batch_refused_for_its_models_name_is_taken_once_the_name_is_told(tmp_path):
    page = json.loads(page_of("ok")) | {"model": "alias"}
    line = {"id": "b", "response": {"status_code": 200, "body": page}}
    for echoes, flagged in (((), 1), ((), 1), (["alias"], 0), ((), 0)):
        options = {"price": PRICE, "offline": True, "echoes": echoes}
        with LLM("loop", store=tmp_path / "calls.sqlite", **options) as llm:
            body = llm.body("say")
            if flagged:
                with pytest.raises(NoAnswer, match="asked loop, got alias.*echoes"):
                    take_reply(llm, body, line)
            else:
                assert take_reply(llm, body, line).text == "ok"
            assert (llm.ledger.total().calls, llm.ledger.total().flagged) == (1, flagged)


def test_importing_the_client_opens_nothing():
    code = "import sgd.llm, threading; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
