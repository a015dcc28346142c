"""What the search for sigma and lr decides on landscapes that are known."""

import math

import numpy as np
import pytest

from esfast.trainer.search import Look, search

SCALE, PROMPTS = 0.08, 64


class Landscape:
    """Members of sigma s keep exp(-(s / broken)^2) of what the model gets. A pair differs by slope * s along its
    direction, on every prompt alike, beside noise of the prompts."""

    def __init__(self, broken=0.02, slope=3.0, base=0.4, noise=0.3, floor=0.0, dead_from=math.inf, seed=0):
        self.broken, self.slope, self.noise, self.floor, self.dead_from = broken, slope, noise, floor, dead_from
        random = np.random.default_rng(seed)
        self.directions = random.standard_normal(64)
        self.of_prompts = random.standard_normal((64, 2, PROMPTS))
        self.base = np.full(PROMPTS, base) + noise * random.standard_normal(PROMPTS)
        self.asked = 1

    def __call__(self, sigma, pairs):
        self.asked += 2 * pairs
        kept = math.exp(-((sigma / self.broken) ** 2))
        d = self.slope * sigma * kept * self.directions[:pairs, None, None] * np.array([1, -1])[:, None]
        same = min(1.0, sigma / 0.01)
        rewards = self.floor + kept * (self.base - self.floor + same * self.noise * self.of_prompts[:pairs]) + d
        if sigma > self.dead_from:
            rewards[0, 0] = math.nan
        return Look(sigma, self.base, rewards)


@pytest.mark.parametrize("broken", [0.0005, 0.002, 0.008, 0.03])
@pytest.mark.parametrize("offset", [0.0, -20.0, 1000.0])
def test_sigma_is_where_members_are_not_yet_broken_whatever_the_scale_of_rewards(broken, offset):
    found = search(Landscape(broken, slope=2 / broken, base=offset + 0.4, floor=offset), SCALE, 150)
    # half is lost at 0.83 broken, a tenth at 0.32
    assert broken / 8 < found.sigma <= 0.9 * broken and broken / 8 < found.tolerated < 0.7 * broken and found.learns


def test_the_noise_that_the_weights_tolerate_does_not_depend_on_the_unit_of_rewards():
    one, other = (search(Landscape(0.01, base=0.4 * u, noise=0.3 * u, slope=3 * u), SCALE, 150) for u in (1, 1e3))
    assert other.sigma == one.sigma and other.tolerated == pytest.approx(one.tolerated)


def test_weights_whose_scale_says_little():
    """As those of LoRA, half of which are zeros: members at their RMS are whole."""
    found = search(Landscape(broken=0.6, slope=3.0), SCALE, 300)
    assert 0.05 < found.sigma < 0.6 and found.losses[-1] == 1.0


@pytest.mark.parametrize("members", [30, 60, 150, 750])
def test_no_more_members_than_allowed(members):
    asked = Landscape()
    search(asked, SCALE, members)
    assert asked.asked <= members


def test_too_few_members_to_search():
    asked = Landscape()
    found = search(asked, SCALE, 10)
    assert asked.asked == 1 and found.sigma == SCALE / 10 and not found.learns
    assert found.why.startswith("the run is too short")


def test_members_that_give_no_text_are_broken():
    found = search(Landscape(broken=10, dead_from=0.011, slope=30), SCALE, 150)
    assert found.sigma <= 0.011 and found.learns


def test_rewards_that_are_all_the_same():
    asked = Landscape(base=0.0, noise=0.0, slope=0.0)
    found = search(asked, SCALE, 1000)
    assert not found.learns and "nothing to learn from" in found.why and asked.asked <= 5


def test_a_signal_that_chance_explains_is_none():
    """Of noise alone half of the estimates are above zero, and one of four nearly always is."""
    random = np.random.default_rng(3)
    base, said = np.full(PROMPTS, 0.5), []
    for _ in range(20):

        def ask(sigma, pairs):
            kept = math.exp(-((sigma / 0.02) ** 2))
            return Look(sigma, base, kept * (base + 0.3 * random.standard_normal((pairs, 2, PROMPTS))))

        said.append(search(ask, SCALE, 150).why.startswith("no signal"))
    assert sum(said) >= 8


def test_no_signal_is_said():
    found = search(Landscape(broken=0.02, slope=0.0, noise=0.0), SCALE, 150)
    assert found.why.startswith("no signal") and found.sigma < 0.02


def test_a_model_that_is_no_better_than_noise_has_nothing_to_lose():
    found = search(Landscape(broken=1e9, slope=4.0, noise=0.05), SCALE, 150)
    assert found.sigma >= 0.02 and found.losses == (0.0,) * len(found.losses)


def few_prompts(successes, slope, seed=0):
    """A model that succeeds on a few of 14 prompts, whose members all answer as it does up to an eighth of the weights'
    scale. At a quarter of it some differ, and from the scale itself on none succeeds."""
    random, base = np.random.default_rng(seed), (np.arange(14) < successes).astype(float)

    def ask(sigma, pairs):
        rewards = np.tile(base, (pairs, 2, 1))
        if sigma > SCALE / 8:
            other = random.random(rewards.shape) < 0.1
            rewards[other] = 1 - rewards[other]
            rewards[: pairs // 2, 0] += slope
        return Look(sigma, base, rewards if sigma < SCALE else np.zeros_like(rewards))

    return ask


def test_a_few_prompts_tell_the_model_from_noise():
    """Three of 14 are within two standard errors of their own spread from none; but no member of noise gets one."""
    found = search(few_prompts(3, 0.3), SCALE, 65)
    assert found.learns and "that does not break members" in found.why
    assert SCALE / 8 < found.sigma <= SCALE / 2 and found.losses[-1] == 1.0


def test_members_that_gain_on_the_whole_need_no_larger_sigma():
    """One of the first pair gets much more than the model and the other less, as where a reward pays for short text:
    on every prompt alike, so that the pair gains surely."""
    gained = np.array([10.0, -2.0])[None, :, None]
    noise, base = np.random.default_rng(0).standard_normal((12, 2, 14)), np.zeros(14)

    def ask(sigma, pairs):
        if sigma > SCALE:
            return Look(sigma, base, np.full((pairs, 2, 14), -30.0))
        return Look(sigma, base, sigma / SCALE * (gained + noise[:pairs]))

    found = search(ask, SCALE, 65)
    assert found.learns and found.sigma <= SCALE / 2


def test_no_guess_is_a_sigma_at_which_members_answer_alike():
    """There no update would have a direction, and the run would end where it began."""
    found = search(few_prompts(1, 0.0), SCALE, 65)
    assert not found.learns and found.why.endswith("the smallest one at which members got other rewards than the model")
    assert found.sigma == found.tolerated == SCALE / 4


@pytest.mark.parametrize("rare", [False, True], ids=["noise", "rare success"])
def test_a_model_of_which_nothing_can_be_told_gets_a_guess(rare):
    """Neither does it get more than noise does, nor do members differ by more than chance: the largest sigma would
    break it for nothing."""
    found = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        base = np.eye(1, PROMPTS)[0] if rare else random.standard_normal(PROMPTS)

        def ask(sigma, pairs, base=base, random=random):
            rewards = random.standard_normal((pairs, 2, PROMPTS))
            return Look(sigma, base, (rewards > 2.15).astype(float) if rare else rewards)

        found.append(search(ask, SCALE, 150))
    guesses = [each for each in found if "guess" in each.why]
    assert len(guesses) >= 14 and not any(each.learns for each in guesses)
    assert all(each.sigma == each.tolerated == SCALE / 10 for each in guesses)


def test_a_model_that_gains_by_noise_is_not_searched_beyond_its_weights():
    """As one whose reward pays for short text, which noise makes shorter up to the RMS, and longer beyond."""
    landscape = Landscape(broken=1e9, slope=0.0, noise=0.1)

    def ask(sigma, pairs):
        look = landscape(sigma, pairs)
        better = 8 * min(sigma, SCALE) - 8 * max(0.0, sigma - SCALE)
        slope = 6 * min(sigma, SCALE / 2) * landscape.directions[:pairs, None, None] * np.array([1, -1])[:, None]
        return Look(sigma, look.base, look.rewards + better + slope)

    found = search(ask, SCALE, 150)
    assert SCALE / 16 <= found.sigma <= SCALE / 2 and found.tolerated <= SCALE / 2 and found.learns


def test_rewards_of_prompts_alone_are_nothing_to_learn_from():
    prompts = np.arange(float(PROMPTS))
    found = search(lambda sigma, pairs: Look(sigma, prompts, np.tile(prompts, (pairs, 2, 1))), SCALE, 150)
    assert not found.learns and "nothing to learn from" in found.why and found.sigma == found.tolerated == SCALE / 10


def test_members_that_are_broken_at_every_sigma():
    found = search(Landscape(broken=1e-12), SCALE, 150)
    assert "broken at every sigma" in found.why and found.sigma < SCALE / 1000 and found.tolerated > 0


def test_completions_that_no_function_judges_at_large_sigmas():
    """Of broken members a reward function may return None for nearly all completions, so that no prompt is left."""
    whole = Landscape(broken=0.02, slope=30)

    def ask(sigma, pairs):
        look = whole(sigma, pairs)
        if sigma > 0.02:
            look.rewards[np.arange(2 * pairs * PROMPTS).reshape(look.rewards.shape) % 3 > 0] = math.nan
            look.rewards[0, 0, ::3] = math.nan
        return look

    found = search(ask, SCALE, 150)
    assert 0 < found.tolerated < found.sigma <= 0.02 and all(map(math.isfinite, found.losses))


def test_signal_is_not_made_by_the_noise_of_prompts():
    """Over many draws the estimate of a signal of zero is zero, and that of a known one is right."""
    random = np.random.default_rng(1)

    def of(slope):
        rewards = random.standard_normal((4000, 2, 16)) + slope * random.standard_normal((4000, 1, 1)) * np.array(
            [[[1.0], [-1.0]]]
        )
        return Look(1.0, np.zeros(16), rewards)

    assert abs(of(0.0).signal) < 4 / 16 / math.sqrt(4000) and of(0.5).signal == pytest.approx(0.25, rel=0.1)
    assert of(0.0).noise == pytest.approx(0.5 / 16, rel=0.1)


def test_prompts_that_nobody_judges_are_left_out():
    look = Landscape()(0.01, 4)
    look.rewards[1, 0, 3] = math.nan
    kept = [i for i in range(PROMPTS) if i != 3]
    other = Look(0.01, look.base[kept], look.rewards[:, :, kept])
    assert (look.signal, look.noise, look.lost) == (other.signal, other.noise, other.lost)
