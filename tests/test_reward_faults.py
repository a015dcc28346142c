"""Reward functions that change what they are given, exit, hang behind an alarm of their own, or return nonsense."""

import logging
import re
import signal
import threading
import time

import odd_scoring as odd
import pytest

import esfast
from esfast.rewards.scorer import RewardError, Scorer, check_metrics, combine, judge
from esfast.tasks import embedded
from esfast.utils.time_limit import TooSlow, limited

TEXTS = ["one", "three"]


@pytest.fixture(scope="module")
def scorers():
    """Scorers by their number of workers: 0 scores in this process, 1 in a worker."""
    functions = [odd.marks, odd.exits, odd.returns, odd.yields, odd.length]
    made = {workers: Scorer(functions, workers=workers, timeout=60) for workers in (0, 1)}
    yield made
    for scorer in made.values():
        scorer.close()


def asked(how):
    return [{"prompt": text, "how": how} for text in TEXTS]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_call_changes_no_other_call_sees(scorers, workers):
    row = {"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "gold": ["x", ["y", "z"]]}
    # the same row twice, as for two generations of a prompt
    rows, completions = [row, row], [[{"role": "assistant", "content": "c"}] for _ in range(2)]
    s = scorers[workers]
    for _ in range(3):
        assert s.submit([odd.marks] * 2, rows, completions).result() == [[2.0, 2.0]] * 2
    assert row["gold"] == ["x", ["y", "z"]] and len(row["prompt"]) == 2 and len(completions[0]) == 1


def test_what_cannot_be_copied_is_shared_with_one_warning(caplog):
    lock = threading.Lock()
    seen = []

    def keeps(prompts, completions, lock, **columns):
        seen.extend(lock)
        return [0.0] * len(completions)

    scorer = Scorer([keeps])
    with caplog.at_level(logging.WARNING, "esfast.utils.rows"):
        for _ in range(2):
            scorer.submit([keeps], [{"prompt": "a", "lock": lock}], ["b"]).result()
    assert seen == [lock, lock] and caplog.text.count("'lock': its values can't be copied") == 1


@pytest.mark.parametrize(
    ("workers", "how", "message"),
    [
        (0, "sys.exit", "raised SystemExit: 3"),
        (0, "close", "raised GeneratorExit: "),
        (1, "sys.exit", "raised SystemExit: 3"),
        (1, "interrupt", "raised KeyboardInterrupt: no Ctrl-C"),
        (1, "close", "raised GeneratorExit: "),
        (1, "os._exit", "ended its process with status 3"),
        (1, "SIGKILL", "ended its process with status -9 (SIGKILL: out of memory?)"),
    ],
)
def test_a_function_that_exits_is_named(scorers, workers, how, message):
    with pytest.raises(RewardError, match=f"^reward function exits {re.escape(message)}"):
        scorers[workers].submit([odd.length, odd.exits], asked(how), TEXTS).result()
    assert scorers[workers].submit([odd.length], asked("x"), TEXTS).result() == [[3.0, 5.0]]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("dict", " returned {'a': 1.0, 'b': 2.0} (dict): expected a list of 2 numbers"),
        ("set", " returned {1.0, 2.0} (set): expected a list of 2 numbers"),
        ("text", " returned '12' (str): expected a list of 2 numbers"),
        ("bytes", " returned b'12' (bytes): expected a list of 2 numbers"),
        ("none", " returned None (NoneType): expected a list of 2 numbers"),
        ("number", " returned 0.5 (float): expected a list of 2 numbers"),
        ("0-d array", " returned a single number: expected a list of 2"),
        ("0-d tensor", " returned a single number: expected a list of 2"),
        ("rows", ": its reward for completion 0 is array([1., 1.]), no finite number"),
        ("nested", ": its reward for completion 0 is [1.0], no finite number"),
        ("complex", ": its reward for completion 0 is 1j, no finite number"),
        ("texts", ": its reward for completion 0 is '1', no finite number"),
        ("bytes within", ": its reward for completion 0 is b'1', no finite number"),
        ("objects", ": its reward for completion 0 is <object object at"),
        ("huge", ": its reward for completion 0 is a whole number too large for a float, no finite number"),
        ("enormous", ": its reward for completion 0 is a whole number too large for a float, no finite number"),
        ("vast", ": its reward for completion 0 is 1e+308, too large: rewards are limited to 3.4e+38"),
        ("infinite", ": its reward for completion 0 is -inf, no finite number"),
        ("three", ": expected 2 rewards, got more"),
        ("endless", ": expected 2 rewards, got more"),
    ],
)
def test_what_is_no_list_of_finite_numbers_is_refused(scorers, workers, how, message):
    with pytest.raises(RewardError) as caught:
        scorers[workers].submit([odd.returns], asked(how), TEXTS).result()
    assert str(caught.value).startswith(f"reward function returns{message}")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("workers", [0, 1])
def test_numbers_of_any_kind_are_taken(scorers, workers):
    kinds = {"array", "float16", "tensor", "bfloat16", "bfloat16s", "column", "tuple", "decimals"}
    want = dict.fromkeys(kinds, [1.0, 2.0]) | {"bools": [1.0, 0.0], "none is fine": [None, 2.0]}
    for how, values in want.items():
        found = scorers[workers].submit([odd.returns, odd.yields], asked(how), TEXTS).result()
        assert found == [values, [1.0, 2.0]], how
        assert all(v is None or type(v) is float for v in found[0])


def test_sums_that_are_too_large_are_refused():
    with pytest.raises(RewardError, match="weighted sum for completion 1 is too large"):
        combine([[1.0, 3e38], [0.0, 3e38]], [1.0, 1.0])
    with pytest.raises(RewardError, match="reward_weights"):
        combine([[1.0]], [1e300])
    assert combine([[3e38]], [1.0]) == [3e38]


def own_alarm():
    """Sets and clears an alarm, as graders do that limit their own time."""
    signal.signal(signal.SIGALRM, lambda *received: None)
    signal.alarm(5)
    signal.alarm(0)


def spins():
    while True:
        pass


def backtracks():
    re.match("(a+)+$", "a" * 60 + "b")


def ignores():
    own_alarm()
    with pytest.raises(BaseException):  # noqa: B017  (the limit's)
        time.sleep(20)
    return "rewards of a call that was interrupted"


def own_timer():
    signal.setitimer(signal.ITIMER_REAL, 9, 9)
    time.sleep(20)


@pytest.mark.parametrize("hang", [spins, lambda: time.sleep(20), backtracks, ignores, own_timer])
def test_a_limit_that_an_alarm_of_the_function_s_own_does_not_switch_off(hang):
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGURG)
    began = time.monotonic()
    with pytest.raises(TooSlow):
        limited(0.2, lambda: (own_alarm(), hang())[1])
    assert 0.2 <= time.monotonic() - began < 10
    assert (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGURG)) == before
    time.sleep(0.01)  # nothing comes late


def test_a_limit_by_a_thread_where_there_is_no_timer_of_the_kernel(monkeypatch):
    monkeypatch.setattr("esfast.utils.time_limit._kernel_timer", lambda seconds: None)
    for hang in (spins, lambda: time.sleep(20)):
        with pytest.raises(TooSlow):
            limited(0.1, hang)
    assert limited(20, lambda: 7) == 7


def test_a_limit_in_another_thread():
    outcome = []

    def work():
        for call in (spins, lambda: 7):
            try:
                outcome.append(limited(0.2, call))
            except TooSlow:
                outcome.append("too slow")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert outcome == ["too slow", 7]


@pytest.mark.parametrize("timeout", [60.0, float("inf")])
def test_an_alarm_that_was_set_before_rings_as_it_would_have(timeout):
    rang = []
    before, outer = signal.signal(signal.SIGALRM, lambda *received: rang.append(time.monotonic())), signal.getitimer(0)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        began = time.monotonic()
        limited(timeout, own_alarm)
        assert 0.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
        time.sleep(0.4)
        assert len(rang) == 1 and rang[0] - began >= 0.3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_an_alarm_that_the_function_left_does_not_ring_later():
    rang = []
    limited(60, lambda: (signal.signal(signal.SIGALRM, rang.append), signal.setitimer(signal.ITIMER_REAL, 0.05)))
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 or signal.getitimer(signal.ITIMER_REAL)[0] > 1
    time.sleep(0.1)
    assert not rang


@pytest.mark.parametrize(
    "name", ["reward", "reward_se", "length", "kl_to_base", "seconds", "", "a b", "a\n", "<b>", "_x", 3, "x" * 65, "é!"]
)
def test_names_that_metrics_may_not_have(name):
    with pytest.raises(ValueError, match="^metrics: "):
        check_metrics({name: odd.length})


def test_metrics_are_functions_by_name():
    for name in ("accuracy", "math/accuracy", "pass.1", "f1-score", "Länge", "rewards"):
        assert check_metrics({name: odd.length}) == {name: odd.length}
    assert check_metrics(None) == {}
    with pytest.raises(TypeError, match="metrics: expected functions by name"):
        check_metrics([odd.length])


def test_an_evaluation_goes_without_what_fails_where_that_is_asked_for(caplog):
    rows, scorer = asked("infinite"), Scorer([odd.length, odd.returns])
    metrics = {"short": odd.length, "bad": odd.returns, "silent": lambda **columns: [None, None]}
    arguments = ([1.0], metrics, rows, TEXTS)
    with pytest.raises(RewardError, match="reward function returns"):
        judge(scorer, [odd.length], *arguments)
    with caplog.at_level(logging.WARNING, "esfast.rewards.scorer"):
        scores, figures = judge(scorer, [odd.length], *arguments, skip=True)
    assert scores == [[3.0, 5.0]] and figures == {"eval_reward": 4.0, "eval_reward_se": 1.0, "eval_short": 4.0}
    assert caplog.text.count("the evaluation goes without: reward function returns") == 1
    scores, figures = judge(scorer, [odd.returns], *arguments, skip=True)
    assert scores == [[None, None]] and figures == {"eval_short": 4.0}


def test_a_function_without_a_name_is_called_by_its_class():
    class Grader:
        def __call__(self, completions, **columns):
            return [1.0]

    with pytest.raises(RewardError, match="^reward function Grader: expected 2 rewards, got 1$"):
        Scorer([]).submit([Grader()], asked("x"), TEXTS).result()


def trainer(folder, reward, metrics=None, **changes):
    settings = {"generations": 1, "population_size": 4, "prompts_per_generation": 2, "max_completion_length": 4}
    config = esfast.ESConfig(output_dir=str(folder / "run"), progress=False, **settings, **changes)
    tokenizer = embedded.make_tokenizer()
    rows = [{"prompt": text, "gold": ["x", "y"]} for text in "abcd"]
    return esfast.ESTrainer(
        embedded.make_model(tokenizer),
        reward,
        config,
        rows,
        rows,
        tokenizer,
        metrics=metrics,
        engine=lambda prompts: ["12"] * len(prompts),
    )


def test_each_member_is_scored_with_the_rows_as_they_are(tmp_path):
    """Evaluations and metrics get unchanged rows, too. With on_reward_error="skip", an evaluation whose reward fails
    does not end the run."""
    seen = []

    def reward(prompts, completions, gold, **columns):
        seen.append([len(g) for g in gold])
        gold[0].pop()
        if len(completions) == 4:
            raise ValueError("of an evaluation")
        return [float(len(seen))] * len(completions)

    made = trainer(tmp_path, reward, {"count": lambda gold, **columns: list(map(len, gold))}, on_reward_error="skip")
    summary = made.train()
    assert seen == [[2] * 4] + [[2] * 2] * 4 + [[2] * 4]
    assert summary["after"] == {"eval_count": 2.0, "eval_length": 2.0}
    assert made.folder.read_metrics()[-1]["reward_max"] == 5.0


def test_a_keyboard_interrupt_of_a_function_s_own_is_no_ctrl_c(tmp_path):
    def own(completions, **columns):
        raise KeyboardInterrupt("of a grader")

    def pressed(completions, **columns):
        signal.raise_signal(signal.SIGINT)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="^reward function own raised KeyboardInterrupt: of a grader"):
        trainer(tmp_path / "own", own).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "pressed", pressed).train()
    with pytest.raises(KeyboardInterrupt):  # who handles Ctrl-C here can't be told
        Scorer([own]).submit([own], asked("x"), TEXTS).result()


def test_a_metric_called_reward_is_refused_at_the_door(tmp_path):
    with pytest.raises(ValueError, match="metrics: 'reward' is a name of the trainer's own"):
        trainer(tmp_path, odd.length, {"reward": odd.length})
    assert not (tmp_path / "run").exists()
