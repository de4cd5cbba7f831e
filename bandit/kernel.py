"""The compiled loops: exact updates with their metrics; sampled pairs: law, draws, step; best and worst of draws.

The formulas are those of bandit/exact.py, which reads them in numpy; numbers in brackets are the equations of
docs/bandit.md. Everything compiled stands in this file: numba's cache on disk looks at a function's own file alone.
With powers e = exp(u) and p = exp(r), both centred, sigma(d) = e_y / (e_y + e_y') and P* = p_y / (p_y + p_y'): no
exponential per pair, and P* - sigma(d) costs one division.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
from numba import njit

# Sums may be reordered, which lets a loop use vector instructions; infinities and NaN keep their meaning.
FAST = {"reassoc", "arcp", "contract", "nsz"}

# Taylor: exp(x) up to x^13 for |x| <= 1/2, and (exp(x) - 1 - x) / x^2 up to x^11 for |x| <= 1/4.
INVERSE_FACTORIALS = tuple(1 / math.factorial(k) for k in range(12, -1, -1))
SERIES = tuple(1 / math.factorial(k) for k in range(13, 1, -1))

ROUNDER = 1.5 * 2.0**52
LOG_2, LOG_2_HIGH, LOG_2_LOW = math.log(2), 6.93147180369123816490e-01, 1.90821492927058770002e-10

# Up to this range of u + range of r products of powers neither overflow nor vanish, in whatever order.
WIDEST = 690.0


def compiled(function, fastmath=FAST):
    """Compile at the first call and keep the result on disk; without, where no folder can be written."""
    options = {"error_model": "numpy", "fastmath": fastmath}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)


@partial(compiled, fastmath={"contract"})  # sums in the order written: the rounding is the method
def exponentials(x, out, bits):
    """Fill out with exp(x) to a unit in the last place, in vector instructions; x and out [n], bits [n] int64.

    exp(x) = 2^k exp(x - k log 2) with k = round(x / log 2), which adding 1.5 * 2^52 leaves in the lowest bits; the
    rest is Taylor's series to x^13. Results stay within the floating-point range, also for an infinite x.
    """
    rounded, as_bits = bits.view(np.float64), out.view(np.int64)
    for y in range(x.size):
        inside = min(max(x[y], -708.0), 709.0)
        rounded[y] = inside * (1 / LOG_2) + ROUNDER
        k = rounded[y] - ROUNDER
        rest = (inside - k * LOG_2_HIGH) - k * LOG_2_LOW
        value = 1 / 6227020800
        for coefficient in INVERSE_FACTORIALS:
            value = value * rest + coefficient
        out[y] = value
    for y in range(x.size):
        as_bits[y] += bits[y] << 52


class Setup(NamedTuple):
    """A run's constants: bandit, step rule, and the pair law w = constant + sum_k (a_k b_k' + b_k a_k').

    Attributes:
        rewards, powers, log_ref, log_optimum, optimum: r, exp(r) centred, log pi_ref, log pi*, pi*; [envs, |Y|].
        beta: KL coefficient.
        keep: 1 - 2 * share of flipped labels.
        by_rule, rates: with by_rule the gain is rates / |Y| times the law's scale, else 2 beta^2 rates / Z; [envs].
        constant: weight that all pairs have.
        masses: [2], 0 where there is no term k; a_k carries it.
        slopes, bases: log a_k or b_k = slopes[k, side] . (u, u before the last update) + bases[k, side], centred;
            [2, 2, 2] and [envs, 4, |Y|].
        normalised: a_k and b_k are made to sum to 1; else there is one term at most.
        fixed: no slope differs from 0.
        powers_of_state: the only term is a = exp(u), b = exp(-u).
        limit: |log a_k b_k'| is clipped to it (inf: it is not), [envs].
    """

    rewards: np.ndarray
    powers: np.ndarray
    log_ref: np.ndarray
    log_optimum: np.ndarray
    optimum: np.ndarray
    beta: float
    keep: float
    by_rule: bool
    rates: np.ndarray
    constant: float
    masses: np.ndarray
    slopes: np.ndarray
    bases: np.ndarray
    normalised: bool
    fixed: bool
    powers_of_state: bool
    limit: np.ndarray


@compiled
def extent(x):
    """Smallest and largest of x; much faster than the methods min and max. NaN is passed over."""
    low, high = math.inf, -math.inf
    for y in range(x.size):
        low, high = min(low, x[y]), max(high, x[y])
    return low, high


@compiled
def centre(u, x, e, bits):
    """Fill x with u - (max u + min u) / 2 and e with exp(x); return the range of u."""
    low, high = extent(u)
    for y in range(u.size):
        x[y] = u[y] - (low + high) / 2
    exponentials(x, e, bits)
    return high - low


@compiled
def weigh_arm(logs, shift, normalised, arm, bits):
    """Fill arm [|Y|] with exp(logs + shift), divided by its sum if normalised; return what it was multiplied by."""
    for y in range(logs.size):
        logs[y] += shift
    exponentials(logs, arm, bits)
    if not normalised:
        return 1.0
    total = 0.0
    for y in range(arm.size):
        total += arm[y]
    for y in range(arm.size):
        arm[y] /= total
    return 1 / total


@compiled
def weigh_term(mass, slopes, base_a, base_b, normalised, limit, x, before, a, b, log_a, log_b, bits):
    """Fill a and b [|Y|] of one term at the state x; return S and the largest of exp(S) (a b' + b a').

    Where the weights are clipped at |log a b'| = limit, S is at most that. log_a and log_b are overwritten.
    """
    for y in range(x.size):
        log_a[y] = slopes[0, 0] * x[y] + slopes[0, 1] * before[y] + base_a[y]
        log_b[y] = slopes[1, 0] * x[y] + slopes[1, 1] * before[y] + base_b[y]
    high_a, high_b = extent(log_a)[1], extent(log_b)[1]
    log_scale = 0.0 if normalised else min(high_a + high_b, limit)
    shift = 0.0 if normalised else (high_a + high_b - log_scale) / 2
    top = weigh_arm(log_a, shift - high_a, normalised, a, bits) * weigh_arm(
        log_b, shift - high_b, normalised, b, bits
    )
    for y in range(x.size):
        a[y] *= mass
    return log_scale, 2 * mass * top


@compiled
def gain_of(by_rule, rate, beta, num_actions, scale, total):
    """Equation (4)."""
    return rate * scale / num_actions if by_rule else 2 * beta**2 * rate / total


@compiled
def sum_pairs(delta, e, powers, keep, constant, cap, a, b, second, c, d, out):
    """out_y = sum_y' w (P* - sigma(d)), equation (3); return Z and the sum of |delta| over all ordered pairs.

    Each pair is visited once: what it adds to y it takes from y'. Without `second` the law has no term of c and d.
    """
    total, distance, diagonal = 0.0, 0.0, 0.0
    for i in range(delta.size):
        ai, bi, ci, di, ei, pi, vi = a[i], b[i], c[i], d[i], e[i], powers[i], delta[i]
        force = 0.0
        for j in range(i):
            w = constant + ai * b[j] + bi * a[j]
            if second:
                w += ci * d[j] + di * c[j]
            w = min(w, cap)
            above = keep * (pi - powers[j]) * (ei + e[j]) - (ei - e[j]) * (pi + powers[j])
            half = w * above / (2 * (pi + powers[j]) * (ei + e[j]))
            force += half
            out[j] -= half
            total += w
            distance += abs(vi - delta[j])
        out[i] = force
        diagonal += min(constant + 2 * (ai * bi + ci * di), cap)
    return 2 * total + diagonal, 2 * distance


@compiled
def sum_wide_pairs(delta, x, rewards, keep, constant, cap, a, b, c, d, out):
    """The same as `sum_pairs` for any range of u and r: two tanh per pair."""
    total, distance = 0.0, 0.0
    for i in range(delta.size):
        out[i] = 0.0
        for j in range(delta.size):
            w = min(constant + a[i] * b[j] + b[i] * a[j] + c[i] * d[j] + d[i] * c[j], cap)
            wins = keep * math.tanh((rewards[i] - rewards[j]) / 2)
            out[i] += w * (wins - math.tanh((x[i] - x[j]) / 2)) / 2
            total += w
            distance += abs(delta[i] - delta[j])
    return total, distance


@compiled
def gap_of_value(x, beta, log_ref, log_optimum, optimum, logs, pi, bits):
    """beta KL(pi || pi*), equation (6): see exact.value_gap; logs and pi [|Y|] are overwritten."""
    for y in range(x.size):
        logs[y] = x[y] / beta + log_ref[y]
    high = extent(logs)[1]
    for y in range(x.size):
        logs[y] -= high
    exponentials(logs, pi, bits)
    total, gap = 0.0, 0.0
    for y in range(x.size):
        total += pi[y]
    log_total = math.log(total)
    for y in range(x.size):
        ahead = log_optimum[y] - (logs[y] - log_total)
        p = pi[y] / total
        near = min(max(ahead, -0.25), 0.25)
        series = 0.0
        for coefficient in SERIES:
            series = series * near + coefficient
        gap += max(p * near * near * series if near == ahead else optimum[y] - p * (1 + ahead), 0.0)
    return beta * gap


@compiled
def iterate(setup, u, before, last, series):
    """Move the states u [envs, |Y|] by as many updates as series [4, envs, updates] has columns, and fill it.

    Column t is measured before update t, as exact.METRICS without `value`. `before` becomes u before the last update,
    `last` what that added.
    """
    s, (envs, num_actions) = setup, u.shape
    # Rows by index: unpacked, numba would not know that they are contiguous.
    work, bits = np.zeros((10, num_actions)), np.empty(num_actions, np.int64)
    a, b, c, d, logs, log_b = work[0], work[1], work[2], work[3], work[4], work[5]
    x, e, delta, pi = work[6], work[7], work[8], work[9]
    masses, first, second, normalised, beta, keep = s.masses, s.slopes[0], s.slopes[1], s.normalised, s.beta, s.keep
    for env in range(envs):
        rewards, powers, limit, rate = s.rewards[env], s.powers[env], s.limit[env], s.rates[env]
        base_a, base_b, base_c, base_d = s.bases[env, 0], s.bases[env, 1], s.bases[env, 2], s.bases[env, 3]
        log_ref, log_optimum, optimum = s.log_ref[env], s.log_optimum[env], s.optimum[env]
        state, past, force = u[env], before[env], last[env]
        low, high = extent(rewards)
        widest = WIDEST - (high - low)
        log_scale, largest, other = 0.0, 0.0, 0.0
        for t in range(series.shape[2]):
            width = centre(state, x, e, bits)
            if s.powers_of_state:  # DPO-Mix-P and its like: no more exponentials
                log_scale = min(width, limit)
                root = math.exp(-log_scale / 2)
                for y in range(num_actions):
                    a[y], b[y] = masses[0] * root * e[y], root / e[y]
            elif (t == 0 or not s.fixed) and masses[0] > 0:
                log_scale, largest = weigh_term(
                    masses[0], first, base_a, base_b, normalised, limit, x, past, a, b, logs, log_b, bits
                )
            if (t == 0 or not s.fixed) and masses[1] > 0:
                _, other = weigh_term(
                    masses[1], second, base_c, base_d, normalised, limit, x, past, c, d, logs, log_b, bits
                )
            root = math.exp(-log_scale / 2)
            scale, constant, cap = (
                1 / (largest + other) if normalised else 1 / root**2,
                s.constant * root**2,
                math.inf,
            )
            if limit < math.inf:
                cap = constant + math.exp(limit - log_scale) + math.exp(-limit - log_scale)
            for y in range(num_actions):
                delta[y] = rewards[y] - x[y]
            if width <= widest:
                total, distance = sum_pairs(delta, e, powers, keep, constant, cap, a, b, masses[1] > 0, c, d, force)
            else:
                total, distance = sum_wide_pairs(delta, x, rewards, keep, constant, cap, a, b, c, d, force)
            low, high = extent(delta)
            series[0, env, t] = distance / num_actions**2
            series[2, env, t] = gap_of_value(x, beta, log_ref, log_optimum, optimum, logs, pi, bits)
            series[3, env, t] = high - low
            gain = gain_of(s.by_rule, rate, beta, num_actions, scale, total)
            for y in range(num_actions):
                past[y] = state[y]
                force[y] *= gain
                state[y] += force[y]


@compiled
def fill_cells(setup, u, before, win_margins, cells, steps):
    """Fill cells [envs, |Y|, |Y|], the probabilities of (winner, loser) at u, and steps [envs]: gain * Z."""
    s, (envs, num_actions) = setup, u.shape
    work, bits = np.zeros((8, num_actions)), np.empty(num_actions, np.int64)
    a, b, c, d, logs, log_b, x, e = work[0], work[1], work[2], work[3], work[4], work[5], work[6], work[7]
    masses, slopes, bases, norm = s.masses, s.slopes, s.bases, s.normalised
    for env in range(envs):
        past, limit, log_scale, largest, other = before[env], s.limit[env], 0.0, 0.0, 0.0
        centre(u[env], x, e, bits)
        if masses[0] > 0:
            log_scale, largest = weigh_term(
                masses[0], slopes[0], bases[env, 0], bases[env, 1], norm, limit, x, past, a, b, logs, log_b, bits
            )
        if masses[1] > 0:
            _, other = weigh_term(
                masses[1], slopes[1], bases[env, 2], bases[env, 3], norm, limit, x, past, c, d, logs, log_b, bits
            )
        scale = 1 / (largest + other) if s.normalised else math.exp(log_scale)
        constant, cell, margins, total = s.constant * math.exp(-log_scale), cells[env], win_margins[env], 0.0
        cap = constant + math.exp(limit - log_scale) + math.exp(-limit - log_scale)
        for i in range(num_actions):
            ai, bi, ci, di = a[i], b[i], c[i], d[i]
            for j in range(num_actions):
                w = min(constant + ai * b[j] + bi * a[j] + ci * d[j] + di * c[j], cap)
                cell[i, j] = w * (1 + margins[i, j])
                total += w
        steps[env] = gain_of(s.by_rule, s.rates[env], s.beta, num_actions, scale, total) * total
        for i in range(num_actions):
            for j in range(num_actions):
                cell[i, j] /= total


@compiled
def move(u, before, counts, steps):
    """One update on drawn pairs: u += steps * sum of sigma(-d) over the pairs won, minus that over those lost.

    counts [envs, |Y|, |Y|] of (winner, loser) cells, steps [envs]; before becomes u.
    """
    envs, num_actions = u.shape
    x, e, out = np.empty(num_actions), np.empty(num_actions), np.empty(num_actions)
    for env in range(envs):
        low, high = extent(u[env])
        for y in range(num_actions):
            x[y] = u[env, y] - (low + high) / 2
            e[y] = math.exp(x[y])
            out[y] = 0.0
        narrow = high - low <= WIDEST
        for i in range(num_actions):
            won = 0.0
            for j in range(num_actions):
                loses = e[j] / (e[i] + e[j]) if narrow else (1 - math.tanh((x[i] - x[j]) / 2)) / 2
                share = counts[env, i, j] * loses
                won += share
                out[j] -= share
            out[i] += won
        for y in range(num_actions):
            before[env, y] = u[env, y]
            u[env, y] += steps[env] * out[y]


@compiled
def part_of(position, per_width, parts):
    """In which of so many equal parts a position lies; in the first one if it is no number."""
    return int(min(max(0.0, position * per_width), parts - 1.0))  # NaN is passed over


@compiled
def look_up(cells, uniforms, counts):
    """Count draws from every row of cells [rows, cells]: the cells into whose share uniforms [rows, draws] fall.

    The range is cut into as many equal parts as there are cells. A table says in which cell the search begins for a
    position in a part, so that a draw looks at no more than two cells on average.
    """
    rows, num_cells = cells.shape
    cumulative, begin = np.empty(num_cells), np.empty(num_cells + 1, np.int64)
    for row in range(rows):
        total = 0.0
        for cell in range(num_cells):
            total += cells[row, cell]
            cumulative[cell] = total
            counts[row, cell] = 0
        per_width = num_cells / total
        begin[:] = 0
        for cell in range(num_cells):  # a cell that ends in an earlier part holds no position of this one
            begin[part_of(cumulative[cell], per_width, num_cells) + 1] += 1
        for part in range(num_cells):
            begin[part + 1] += begin[part]
        for draw in range(uniforms.shape[1]):
            position = uniforms[row, draw] * total
            cell = begin[part_of(position, per_width, num_cells)]
            while cell < num_cells - 1 and cumulative[cell] <= position:
                cell += 1
            counts[row, cell] += 1


@compiled
def power(base, exponent):
    """max(base, 0)^exponent, exponent a whole number above 0."""
    square, result = max(base, 0.0), 1.0
    while exponent:
        if exponent % 2:
            result *= square
        square *= square
        exponent //= 2
    return result


@compiled
def fill_best_and_worst(pi, scores, draws, out):
    """Fill out [envs, |Y|, |Y|]: see samplers.extremes."""
    envs, num_actions = pi.shape
    below, up_to, share = np.empty(num_actions), np.empty(num_actions), np.empty(num_actions)
    for env in range(envs):
        for i in range(num_actions):
            under, level = 0.0, 0.0
            for j in range(num_actions):
                if scores[env, j] < scores[env, i]:
                    under += pi[env, j]
                elif scores[env, j] == scores[env, i]:
                    level += pi[env, j]
            below[i], up_to[i], share[i] = under, under + level, pi[env, i] / level if level > 0 else 0.0
        for i in range(num_actions):
            for j in range(num_actions):
                levels = power(up_to[i] - below[j], draws) - power(up_to[i] - up_to[j], draws)
                levels += power(below[i] - up_to[j], draws) - power(below[i] - below[j], draws)
                # Cancellation can leave -1e-17 of a probability that is 0.
                out[env, i, j] = max(levels, 0.0) * share[i] * share[j]
