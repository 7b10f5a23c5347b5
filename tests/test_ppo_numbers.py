"""PPO's numbers against hand-worked ones and plain Python loops in double precision; padding never enters."""

import json
import math
import statistics
import threading

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm_grpo.advantages import (
    KLController,
    RunningMoments,
    explained_variance,
    gae,
    kl_penalty,
    masked_mean,
    token_rewards,
    whiten,
)
from vlm_grpo.errors import ConfigError
from vlm_grpo.losses import value_loss

NAN, HUGE, INF = math.nan, 1e30, math.inf
BROKEN = pytest.mark.parametrize("padding", [NAN, HUGE, -INF])


def close(expected):
    return pytest.approx(expected, rel=1e-5, abs=1e-6)


def batch(*rows, padding=0.0):
    """(B, T) and its mask; a None is a masked token."""
    values = torch.tensor([[padding if x is None else float(x) for x in row] for row in rows])
    return values, torch.tensor([[x is not None for x in row] for row in rows])


def random_batch(seed, rows=5, width=9, scale=1.0, shift=0.0):
    """Random real tokens, some of them masked in the middle, the last row not at all; NaN where masked."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=generator) < 0.7
    mask[-1] = True
    values = torch.randn(rows, width, generator=generator) * scale + shift
    return torch.where(mask, values, NAN), mask


def reals(values, mask):
    """The real tokens, row after row, as Python's own doubles."""
    return [
        v for row, kept in zip(values.tolist(), mask.tolist(), strict=True) for v, k in zip(row, kept, strict=True) if k
    ]


def loop_gae(rewards, values, gamma, lam):
    """Equation 16 of Schulman et al. 2016 as the sum it is, over one completion without masked tokens."""
    values = [*values, 0.0]
    errors = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [math.fsum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(errors))) for t in range(len(errors))]


def on_processes(*works):
    """Each work with the same ``total``, which adds up over all of them; their results."""
    barrier, sent, results = threading.Barrier(len(works), timeout=20), [None] * len(works), [None] * len(works)

    def process(rank):
        def total(tensor):
            sent[rank] = tensor
            barrier.wait()
            summed = sum(sent)
            barrier.wait()
            return summed

        results[rank] = works[rank](total)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in results), "a process ended without a result"
    return results


# ---- the KL penalty and the reward of each token --------------------------------------------------------------------


def test_kl_penalty_by_hand():
    # covers L6
    logps, ref = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-1.5, -1.0, -0.5]])
    # log-ratios 0.5, -1, 0
    assert kl_penalty(logps, ref, "k1").tolist() == [[0.5, -1.0, 0.0]]
    assert kl_penalty(logps, ref, "k1_clamped").tolist() == [[0.5, 0.0, 0.0]]
    # exp(-0.5) - 1 + 0.5 = 0.1065307; exp(1) - 1 - 1 = 0.7182818
    assert kl_penalty(logps, ref, "k3")[0].tolist() == close([0.1065307, 0.7182818, 0.0])


def test_k3_keeps_its_digits_near_zero():
    # a policy that has hardly moved: k3 is x^2 / 2, which exp(x) - 1 - x in float32 rounds to 0 or below
    gap = 1e-3
    found = kl_penalty(torch.tensor([[0.0]]), torch.tensor([[gap]]), "k3").item()
    assert found == pytest.approx(gap**2 / 2, rel=1e-2)


@BROKEN
def test_score_stands_on_the_last_real_token(padding):
    # covers L6
    kl, mask = batch([0.1, -0.2, 0.3, None], [0.5, None, 0.5, None], [None] * 4, [1, 1, 1, 1], padding=padding)
    rewards = token_rewards(torch.tensor([2.0, -8.0, NAN, 0.0]), kl, mask, coef=0.1)
    expected = [[-0.01, 0.02, 2 - 0.03, 0], [-0.05, 0, -8 - 0.05, 0], [0, 0, 0, 0], [-0.1, -0.1, -0.1, -0.1]]
    assert rewards.dtype == torch.float32
    assert rewards.flatten().tolist() == close([x for row in expected for x in row])
    assert torch.equal(rewards, token_rewards(torch.tensor([2.0, -8.0, NAN, 0.0]), kl, mask.long(), coef=0.1))


# ---- advantages -----------------------------------------------------------------------------------------------------


@BROKEN
def test_gae_by_hand(padding):
    # covers A9
    rewards, mask = batch([0, 0, 1, None], [None, 2, None, 4], padding=padding)
    values, _ = batch([0.5, 0.25, 0.75, None], [None, 1, None, 2], padding=padding)
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # errors of row 1: 0 + 0.125 - 0.5 = -0.375;  0 + 0.375 - 0.25 = 0.125;  1 + 0 - 0.75 = 0.25
    # advantages: 0.25;  0.125 + 0.25 * 0.25 = 0.1875;  -0.375 + 0.25 * 0.1875 = -0.328125
    # row 2, its masked tokens skipped: 4 - 2 = 2;  2 + 0.5 * 2 - 1 = 2, and 2 + 0.25 * 2 = 2.5
    assert advantages.tolist() == [[-0.328125, 0.1875, 0.25, 0], [0, 2.5, 0, 2]]
    assert returns.tolist() == [[0.171875, 0.4375, 1.0, 0], [0, 3.5, 0, 4]]


def test_gae_with_lam_1_is_what_is_still_to_come_less_the_value():
    # covers L8
    rewards, mask = batch([-0.1, -0.2, 3, None])
    values, _ = batch([1, 7, -2, None])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert returns[0].tolist() == close([2.7, 2.8, 3.0, 0])
    assert advantages[0].tolist() == close([1.7, -4.2, 5.0, 0])


def test_without_values_whitening_and_kl_it_is_reinforce():
    # covers L8
    _, mask = batch([1, 1, 1, None], [1, None, 1, 1], [1, None, None, None], [None] * 4)
    scores = torch.tensor([1.5, -0.7, 2.0, 9.0])
    rewards = token_rewards(scores, torch.randn(4, 4), mask, coef=0.0)
    advantages, returns = gae(rewards, torch.zeros(4, 4), mask, gamma=1.0, lam=1.0)
    assert torch.equal(advantages, scores[:, None] * mask)
    assert torch.equal(returns, advantages)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    kept=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    padding=st.sampled_from([NAN, HUGE, -INF]),
)
@example(kept=[[False] * 7], gamma=1.0, lam=1.0, padding=NAN)
@example(kept=[[True] * 7], gamma=1.0, lam=0.95, padding=NAN)
def test_gae_equals_a_loop_over_the_real_tokens(kept, gamma, lam, padding):
    # covers A9
    mask = torch.tensor(kept)
    generator = torch.Generator().manual_seed(sum(map(sum, kept)))
    rewards, values = (torch.where(mask, torch.randn(mask.shape, generator=generator), padding) for _ in range(2))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(len(kept)):
        own = mask[row]
        kept_rewards, kept_values = rewards[row][own].tolist(), values[row][own].tolist()
        expected = loop_gae(kept_rewards, kept_values, gamma, lam)
        assert advantages[row][own].tolist() == close(expected)
        assert returns[row][own].tolist() == close([a + v for a, v in zip(expected, kept_values, strict=True)])
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_gae_is_a_target_without_a_gradient():
    values = torch.ones(1, 3, requires_grad=True)
    assert not any(part.requires_grad for part in gae(torch.ones(1, 3), values, torch.ones(1, 3)))


def test_long_completions_in_half_precision_are_summed_in_float32():
    advantages, _ = gae(torch.ones(1, 600).bfloat16(), torch.zeros(1, 600).bfloat16(), torch.ones(1, 600), 1.0, 1.0)
    assert advantages[0, :3].tolist() == [600, 599, 598]  # bfloat16 cannot count beyond 256


# ---- whitening and means --------------------------------------------------------------------------------------------


@BROKEN
def test_whitening_by_hand(padding):
    # covers L8
    values, mask = batch([1, 2, None], [None, 3, None], padding=padding)
    # mean 2, unbiased variance (1 + 0 + 1) / 2 = 1
    assert whiten(values, mask).flatten().tolist() == close([-1, 0, 0, 0, 1, 0])
    assert whiten(values, mask, shift_mean=False).flatten().tolist() == close([1, 2, 0, 0, 3, 0])
    assert masked_mean(values, mask).item() == 2


@pytest.mark.parametrize("shift", [0.0, 1000.0])
@pytest.mark.parametrize("seed", range(3))
def test_whitening_equals_doubles(seed, shift):
    values, mask = random_batch(seed, shift=shift)
    own = reals(values, mask)
    mean, variance = statistics.fmean(own), statistics.variance(own)
    whitened = [(x - mean) / math.sqrt(variance + 1e-8) for x in own]
    tolerance = 1e-5 if shift == 0 else 2e-4  # around 1000, a float32 has a digit of 6e-5
    assert reals(whiten(values, mask), mask) == pytest.approx(whitened, abs=tolerance)
    kept = reals(whiten(values, mask, shift_mean=False), mask)
    assert kept == pytest.approx([x + mean for x in whitened], abs=tolerance)
    assert masked_mean(values, mask).item() == pytest.approx(mean, abs=tolerance)
    assert not whiten(values, mask, shift_mean=False)[~mask].any()


@pytest.mark.parametrize("value", [0.0, 0.1, -1.7, 1234.567, 1e8])
@pytest.mark.parametrize("tokens", [1, 2, 500, 20000])
def test_equal_values_are_only_centred(value, tokens):
    # float32 rounds a mean of many numbers, and what is left of each would be divided by next to nothing
    values, mask = batch([value] * tokens + [None], padding=NAN)
    assert whiten(values, mask).abs().max() <= 1e-7 * abs(value)
    kept = whiten(values, mask, shift_mean=False)[0, :-1]
    assert (kept - values[0, :-1]).abs().max() <= 1.3e-7 * abs(value)


def test_values_equal_but_for_rounding_are_only_centred():
    values = torch.tensor([[100.0, 100.00001, 100.0, 100.00001]])
    assert values.unique().numel() == 2
    assert whiten(values, torch.ones(1, 4)).abs().max() < 1e-5  # not 0.07, by a variance of 2e-11 plus 1e-8


def test_no_real_token_is_no_nan():
    values, mask = batch([None, None], padding=NAN)
    assert whiten(values, mask).tolist() == [[0, 0]]
    assert whiten(values, mask, shift_mean=False).tolist() == [[0, 0]]
    assert masked_mean(values, mask).item() == 0
    assert explained_variance(values, values, mask).item() == 0


def test_a_real_nan_is_not_hidden():
    values = torch.tensor([[1.0, NAN]])
    assert whiten(values, torch.ones(1, 2)).isnan().all()
    assert masked_mean(values, torch.ones(1, 2)).isnan()


def test_processes_whiten_as_one():
    values, mask = random_batch(7, rows=6)
    mask[4:] = False  # the second process has no real token in its last rows, the third none at all
    parts = [slice(0, 3), slice(3, 5), slice(5, 6)]
    works = [lambda total, p=p: whiten(values[p], mask[p], total=total) for p in parts]
    assert torch.allclose(torch.cat(on_processes(*works)), whiten(values, mask), atol=1e-6)
    works = [lambda total, p=p: masked_mean(values[p], mask[p], total) for p in parts]
    assert [found.item() for found in on_processes(*works)] == close([masked_mean(values, mask).item()] * 3)
    works = [lambda total, p=p: explained_variance(values[p].sin(), values[p], mask[p], total) for p in parts]
    alone = explained_variance(values.sin(), values, mask).item()
    assert [found.item() for found in on_processes(*works)] == close([alone] * 3)


def test_explained_variance_by_hand():
    returns, mask = batch([1, 2, 3, None], padding=NAN)
    values, _ = batch([2, 2, 3, None], padding=HUGE)
    # returns - values: -1, 0, 0, of variance 1/3; the returns' own is 1
    assert explained_variance(values, returns, mask).item() == close(2 / 3)
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(returns + 5, returns, mask).item() == 1  # a constant is no variance
    assert explained_variance(torch.zeros(1, 4), returns, mask).item() == 0
    assert explained_variance(-returns, returns, mask).item() == close(-3)  # worse than a constant


@pytest.mark.parametrize("value", [0.0, 0.1, -1.7, 1e6])
@pytest.mark.parametrize("tokens", [77, 500])
def test_equal_returns_have_nothing_to_explain(value, tokens):
    returns = torch.full((1, tokens), value)
    assert explained_variance(torch.randn(1, tokens), returns, torch.ones(1, tokens)).item() == 0


def test_equal_scores_of_long_completions_have_nothing_to_explain():
    # covers L8
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 1000)
    values = torch.randn(4, 1000, generator=generator).clamp(-1, 1) * 3
    rewards = token_rewards(torch.full((4,), 3.0), torch.zeros(4, 1000), mask, 0.0)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert returns.unique().numel() > 1, "each is 3 but for the rounding of sums"
    assert explained_variance(values, returns, mask).item() == 0  # not -1e12


def test_padding_gets_no_gradient():
    values = torch.tensor([[1.0, NAN, 3.0]], requires_grad=True)
    masked_mean(values, torch.tensor([[1, 0, 1]])).backward()
    assert values.grad.tolist() == [[0.5, 0, 0.5]]


# ---- the value loss -------------------------------------------------------------------------------------------------


@BROKEN
def test_value_loss_by_hand(padding):
    # covers A9 L8
    values, mask = batch([1.0, 1.0, None], [0.6, -1.0, None], padding=padding)
    old, _ = batch([0.5, 0.5, None], [0.5, 0.5, None], padding=padding)
    returns, _ = batch([0.0, 2.0, None], [1.0, -2.0, None], padding=padding)
    values.requires_grad_()
    loss, clipfrac = value_loss(values, old, returns, mask, clip=0.2)
    # free and clipped squares: 1 and 0.7^2;  1 and (0.7 - 2)^2 = 1.69;  0.16 both;  1 and (0.3 + 2)^2 = 5.29
    assert loss.item() == close(0.5 * (1 + 1.69 + 0.16 + 5.29) / 4)
    assert clipfrac.item() == 0.5
    loss.backward()
    # (v - R) / 4 where it is free, 0 where it is clipped and at padding
    assert values.grad.flatten().tolist() == close([0.25, 0, 0, -0.1, 0, 0])


def test_value_loss_without_clipping():
    values, mask = batch([1.0, 3.0, None], padding=NAN)
    loss, clipfrac = value_loss(values, values - 9, torch.zeros(1, 3), mask, clip=None)
    assert (loss.item(), clipfrac.item()) == (2.5, 0)  # 0.5 * (1 + 9) / 2


@pytest.mark.parametrize("clip", [0.2, 1.0, None])
@pytest.mark.parametrize("seed", range(3))
def test_value_loss_and_gradient_equal_doubles(seed, clip):
    # covers L8
    values, mask = random_batch(seed)
    old, returns = values + 0.4 * torch.randn(values.shape).nan_to_num(), values * 0.3 + 0.5
    leaf = values.clone().requires_grad_()
    loss, clipfrac = value_loss(leaf, old, returns, mask, clip)
    loss.backward()
    expected, gradient, clipped = [], [], 0
    for v, o, r in zip(*(reals(part, mask) for part in (values, old, returns)), strict=True):
        near = v if clip is None else min(max(v, o - clip), o + clip)
        held = (near - r) ** 2 > (v - r) ** 2
        clipped += held
        expected.append(max((v - r) ** 2, (near - r) ** 2) / 2)
        gradient.append(0.0 if held else v - r)
    count = len(expected)
    assert loss.item() == close(math.fsum(expected) / count)
    assert clipfrac.item() == close(clipped / count)
    assert reals(leaf.grad, mask) == close([g / count for g in gradient])
    assert not leaf.grad[~mask].any()


def test_a_batch_without_real_tokens_can_be_trained_on():
    values = torch.full((1, 3), NAN, requires_grad=True)
    loss, clipfrac = value_loss(values, values.detach(), values.detach(), torch.zeros(1, 3), clip=0.2)
    loss.backward()
    assert (loss.item(), clipfrac.item()) == (0, 0)
    assert values.grad.tolist() == [[0, 0, 0]]


# ---- what lasts over a run ------------------------------------------------------------------------------------------


def test_kl_controller_by_hand():
    # covers A9
    controller = KLController(0.2, target=6, horizon=10000)
    controller.update(12.0, 256)  # twice the target counts as 1.2 times: 0.2 * (1 + 0.2 * 0.0256)
    assert controller.coef == pytest.approx(0.201024, rel=1e-12)
    controller.update(6.0, 256)
    assert controller.coef == pytest.approx(0.201024, rel=1e-12)
    controller.update(6.6, 256)  # 0.1 above: 0.201024 * 1.00256
    assert controller.coef == pytest.approx(0.20153862144, rel=1e-12)
    controller.update(-3.0, 256)  # far below counts as 0.2: 0.20153862144 * 0.99488
    assert controller.coef == pytest.approx(0.2005067436982272, rel=1e-12)
    for broken in (NAN, INF, -INF):
        controller.update(broken, 256)
    assert controller.coef == pytest.approx(0.2005067436982272, rel=1e-12)


def test_kl_controller_equals_a_loop_and_resumes_exactly():
    # covers A9 L10
    kls = (torch.randn(50, generator=torch.Generator().manual_seed(0)) * 4 + 6).tolist()
    controller, coef = KLController(0.05, target=6.0, horizon=1000), 0.05
    for step, kl in enumerate(kls):
        error = kl / 6 - 1
        error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
        coef *= 1 + error * 32 / 1000
        controller.update(kl, 32)
        assert controller.coef == pytest.approx(coef, rel=1e-12)
        if step == 20:
            saved = json.loads(json.dumps(controller.state()))
            resumed = KLController(0.05, target=6.0, horizon=1000)
            resumed.load(saved)
        if step > 20:
            resumed.update(kl, 32)
            assert resumed.coef == controller.coef


def test_a_fixed_coefficient_stays():
    # covers L6
    controller = KLController(0.1)
    controller.update(100.0, 5000)
    assert controller.coef == 0.1
    assert KLController(0.0).coef == 0


def test_more_samples_than_the_horizon_never_make_the_coefficient_negative():
    controller = KLController(1.0, target=6, horizon=10)
    controller.update(0.0, 1000)  # 1 - 0.2 * 100 would reward the KL
    assert controller.coef == pytest.approx(0.8)


def test_running_moments_by_hand():
    # covers A9
    moments = RunningMoments()
    assert (moments.mean, moments.std) == (0, 1)
    moments.update(torch.tensor([NAN]))
    assert (moments.count, moments.mean, moments.std) == (0, 0, 1)
    moments.update(torch.tensor([2.0]))
    assert (moments.count, moments.mean, moments.std) == (1, 2, 1)
    moments.update(torch.tensor([[4.0, NAN], [INF, 6.0]]))
    assert (moments.count, moments.mean) == (3, 4)
    assert moments.std == close(2)  # of 2, 4, 6: (4 + 0 + 4) / 2 = 4


def test_running_moments_equal_doubles_and_resume_exactly():
    # covers A9 L10
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, generator=generator) * 3 + 40 for size in (1, 1, 8, 5, 64, 2)]
    moments, seen = RunningMoments(), []
    for number, scores in enumerate(batches):
        if number == 3:
            resumed = RunningMoments()
            resumed.load(json.loads(json.dumps(moments.state())))
        moments.update(scores)
        seen += scores.tolist()
        assert moments.mean == pytest.approx(statistics.fmean(seen), rel=1e-6)
        assert len(seen) == 1 or moments.std == pytest.approx(statistics.stdev(seen), rel=1e-5)
        if number >= 3:
            resumed.update(scores)
            assert resumed.state() == moments.state()


def test_equal_scores_may_be_divided_by_their_spread():
    moments = RunningMoments()
    for size in (3, 7, 1000):
        moments.update(torch.full((size,), 0.1))
    moments.update(torch.tensor([0.1 + 1e-8]))
    assert moments.std == 1


def test_running_moments_are_the_same_on_all_processes():
    scores = torch.tensor([1.0, 5.0, NAN, 9.0, NAN])

    def work(part):
        def update(total):
            moments = RunningMoments()
            moments.update(scores[part], total)
            return moments.state()

        return update

    first, second, third = on_processes(work(slice(0, 2)), work(slice(2, 4)), work(slice(4, 5)))
    assert first == second == third
    assert first == {"count": 3, "mean": close(5), "squares": close(32)}


# ---- misuse ---------------------------------------------------------------------------------------------------------


def test_an_unknown_estimator_is_named():
    zeros = torch.zeros(1, 1)
    with pytest.raises(ConfigError) as said:
        kl_penalty(zeros, zeros, "k1_clampd")
    assert str(said.value) == (
        'kl_estimator=k1_clampd: there is no such estimator. Did you mean "k1_clamped"? There are: k1, k1_clamped, k3.'
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.01}, "gamma=1.01: needs 0 or more, at most 1. Correct the value."),
        ({"gamma": NAN}, "gamma=nan: needs 0 or more, at most 1. Correct the value."),
        ({"lam": -0.5}, "lam=-0.5: needs 0 or more, at most 1. Correct the value."),
    ],
)
def test_discounts_that_cannot_work(options, message):
    with pytest.raises(ConfigError) as said:
        gae(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), **options)
    assert str(said.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coef": -0.1}, "kl_coef=-0.1: needs 0 or more. Correct the value."),
        ({"coef": NAN}, "kl_coef=nan: needs 0 or more. Correct the value."),
        ({"target": 0}, "kl_target=0: needs more than 0. Correct it, or leave it out for a fixed kl_coef."),
        ({"coef": 0, "target": 6}, "kl_coef=0 beside kl_target=6: 0 cannot adapt. Start from more, such as 0.2."),
        ({"target": 6, "horizon": 0}, "kl_horizon=0: needs more than 0. Correct the value."),
    ],
)
def test_controllers_that_cannot_work(options, message):
    with pytest.raises(ConfigError) as said:
        KLController(**{"coef": 0.2, **options})
    assert str(said.value) == message


@pytest.mark.parametrize("clip", [0, -0.2, NAN])
def test_a_value_clip_that_cannot_work(clip):
    zeros = torch.zeros(1, 1)
    with pytest.raises(ConfigError) as said:
        value_loss(zeros, zeros, zeros, zeros, clip)
    assert str(said.value) == (f"cliprange_value={clip}: needs more than 0. Correct it, or give none for no clipping.")


def test_tensors_that_would_broadcast_are_refused():
    square, column = torch.ones(2, 2), torch.ones(2, 1)
    with pytest.raises(AssertionError, match=r"values is \(2, 1\) where \(2, 2\) belongs"):
        gae(square, column, square)
    with pytest.raises(AssertionError, match=r"scores is \(2, 1\) where \(2,\) belongs"):
        token_rewards(column, square, square, 0.1)
    with pytest.raises(AssertionError, match=r"returns is \(2,\) where \(2, 2\) belongs"):
        value_loss(square, square, torch.ones(2), square, None)
