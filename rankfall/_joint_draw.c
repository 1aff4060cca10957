/* SPDX-License-Identifier: Apache-2.0
 *
 * A draw of many factors and their KL, as _divergence.py has them by some forty calls of torch, in one call; and the
 * gradients of both in another. Numbers are float, and sums over many of them double.
 *
 * The entries of a factor stand as (before, rank, after): an entry belongs to one slice of the bond that governs it,
 * and shares its prior scale. All factors follow each other in buffers of the draws and of what the gradients need.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t Size;
#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
/* Numbers that stand side by side, at any address. */
typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#define FLOATS(v) __builtin_convertvector(v, Floats)
#define INTS(v) __builtin_convertvector(v, Ints)

/* a where a lane of `which` is -1, b where it is 0. */
static inline Floats either(Ints which, Floats a, Floats b)
{
    return (Floats)((which & (Ints)a) | (~which & (Ints)b));
}

/* exp(x), to a rounding or two. Minimax polynomials here and below are those of Moshier's Cephes library. */
static inline Floats exponential(Floats x)
{
    x = either(x < -87.0f, (Floats){0} - 87.0f, either(x > 88.0f, (Floats){0} + 88.0f, x));
    /* Above 0, where cutting off is rounding down. */
    const Ints whole = INTS(x * 1.44269504f + 128.5f) - 128;
    const Floats n = FLOATS(whole);
    const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (Floats)((whole + 127) << 23);
}

/* log(x) for x from the smallest normal number to 1. */
static inline Floats logarithm(Floats x)
{
    /* x = m 2^e with m from sqrt(1/2) to sqrt(2). */
    const Ints bits = (Ints)x - 0x3f3504f3;
    const Ints e = bits >> 23;
    const Floats m = (Floats)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
    Floats p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const Floats n = FLOATS(e), square = m * m;
    return m + (p * m * square - 0.5f * square + n * -2.12194440e-4f) + n * 0.693359375f;
}

static inline Floats root(Floats x)
{
    Floats found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = sqrtf(x[lane]);
    return found;
}

/* Noise: xoshiro128++ (Blackman and Vigna, ACM TOMS 2021) in each lane, begun by splitmix64. */
typedef struct {
    Words state[4];
} Noise;

static Noise noise_from(uint64_t seed)
{
    Noise noise;
    for (int word = 0; word < 4; word++)
        for (int lane = 0; lane < LANES; lane++) {
            uint64_t z = seed += 0x9e3779b97f4a7c15u;
            z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
            z = (z ^ z >> 27) * 0x94d049bb133111ebu;
            noise.state[word][lane] = (uint32_t)((z ^ z >> 31) >> 32);
        }
    return noise;
}

static inline Words turned(Words x, int by)
{
    return x << by | x >> (32 - by);
}

static inline Words words(Noise *noise)
{
    Words *s = noise->state;
    const Words found = turned(s[0] + s[3], 7) + s[0], t = s[1] << 9;
    s[2] ^= s[0], s[3] ^= s[1], s[1] ^= s[2], s[0] ^= s[3], s[2] ^= t;
    s[3] = turned(s[3], 11);
    return found;
}

/* Two normals for each lane (Box and Muller, 1958), of uniform numbers of 24 bits. */
static inline void normals(Noise *noise, Floats *one, Floats *other)
{
    const Words a = words(noise), b = words(noise);
    const Floats uniform = (FLOATS((Ints)(a >> 8)) + 0.5f) * 0x1p-24f;
    const Floats away = root(-2.0f * logarithm(uniform));
    /* An angle within an eighth of a turn of 0; which quarter it is turned to, two more bits say. */
    const Floats angle = (FLOATS((Ints)(b >> 8)) + 0.5f) * (0x1p-24f * 1.57079633f) - 0.785398163f;
    const Floats square = angle * angle;
    Floats p = square * -1.9515295891e-4f + 8.3321608736e-3f;
    p = p * square - 1.6666654611e-1f;
    const Floats sine = (p * square * angle + angle) * away;
    Floats q = square * 2.443315711809948e-5f - 1.388731625493765e-3f;
    q = q * square + 4.166664568298827e-2f;
    const Floats cosine = (q * square * square - 0.5f * square + 1.0f) * away;
    const Ints swaps = -(Ints)(b & 1);
    const Words sign = (b & 2) << 30;
    *one = (Floats)((Words)either(swaps, sine, cosine) ^ sign);
    *other = (Floats)((Words)either(swaps, cosine, sine) ^ sign);
}

static inline double total(Floats v)
{
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

/* Draws of some neighbours: mean + std * noise, with std * noise and std^2. */
static inline void draw_some(
    const float *mean, const float *log_std, const Floats noise, float *drawn, float *away, float *variance)
{
    const Floats std = exponential(*(const Floats *)log_std), off = std * noise;
    *(Floats *)drawn = *(const Floats *)mean + off;
    *(Floats *)away = off;
    *(Floats *)variance = std * std;
}

static void draw_all(
    Size count, const float *mean, const float *log_std, Noise *noise, float *drawn, float *away, float *variance)
{
    Size i = 0;
    Floats one, other;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        normals(noise, &one, &other);
        draw_some(mean + i, log_std + i, one, drawn + i, away + i, variance + i);
        const Size j = i + LANES;
        draw_some(mean + j, log_std + j, other, drawn + j, away + j, variance + j);
    }
    if (i == count) return;
    float part[5][2 * LANES] = {{0}};
    const Size bytes = (count - i) * (Size)sizeof(float);
    memcpy(part[0], mean + i, bytes), memcpy(part[1], log_std + i, bytes);
    normals(noise, &one, &other);
    draw_some(part[0], part[1], one, part[2], part[3], part[4]);
    draw_some(part[0] + LANES, part[1] + LANES, other, part[2] + LANES, part[3] + LANES, part[4] + LANES);
    memcpy(drawn + i, part[2], bytes), memcpy(away + i, part[3], bytes), memcpy(variance + i, part[4], bytes);
}

enum { FEW = 128 }; /* So many numbers are added up as float, sums of them as double. */

static double sum_of(Size count, const float *values)
{
    double found = 0;
    Size i = 0;
    while (i + LANES <= count) {
        Floats sum = {0};
        for (const Size end = i + FEW * LANES; i < end && i + LANES <= count; i += LANES)
            sum += *(const Floats *)(values + i);
        found += total(sum);
    }
    for (; i < count; i++) found += values[i];
    return found;
}

/* mean^2 + variance, summed. */
static double moment_of(Size count, const float *mean, const float *variance)
{
    double found = 0;
    Size i = 0;
    while (i + LANES <= count) {
        Floats sum = {0};
        for (const Size end = i + FEW * LANES; i < end && i + LANES <= count; i += LANES) {
            const Floats m = *(const Floats *)(mean + i);
            sum += m * m + *(const Floats *)(variance + i);
        }
        found += total(sum);
    }
    for (; i < count; i++) found += mean[i] * mean[i] + variance[i];
    return found;
}

enum { MOST_SLICES = 64 }; /* Of which LANES rows side by side are worked on as whole registers. */

/* The same for each slice, where entries of `rank` slices stand side by side, `before` times. */
static void moments_of(Size before, Size rank, const float *mean, const float *variance, double *slices)
{
    for (Size rows = rank <= MOST_SLICES ? before / LANES : 0; rows > 0;) {
        Floats sums[MOST_SLICES];
        memset(sums, 0, sizeof(Floats) * rank);
        const Size some = rows < FEW ? rows : FEW;
        for (Size n = 0; n < some; n++)
            for (Size k = 0; k < rank; k++, mean += LANES, variance += LANES) {
                const Floats m = *(const Floats *)mean;
                sums[k] += m * m + *(const Floats *)variance;
            }
        for (Size lane = 0; lane < LANES; lane++)
            for (Size r = 0; r < rank; r++) slices[r] += ((const float *)sums)[lane * rank + r];
        rows -= some, before -= some * LANES;
    }
    for (; before > 0; before--)
        for (Size r = 0; r < rank; r++, mean++, variance++) slices[r] += *mean * *mean + *variance;
}

/* A factor's place in the buffers is where the one before it ends. */
typedef struct {
    Size before, rank, after;
    Size first; /* The number of its first slice. */
} Place;

/* The prior variance of a slice at its optimum, and what the slice adds to the KL; see _priors.py. */
static double scale_of(double moment, double count, double cauchy, double least, double *kl)
{
    double v;
    if (cauchy > 0) {
        const double e = cauchy * cauchy, b = moment - count * e;
        const double positive = sqrt(b * b + 4 * (count + 2) * e * moment);
        /* Either form alone cancels on one side of b = 0. */
        v = b > 0 ? (b + positive) / (2 * (count + 2)) : positive > b ? 2 * e * moment / (positive - b) : 0;
    } else {
        v = moment / (count + 1);
    }
    if (v < least) v = least;
    *kl += 0.5 * (moment / v + count * log(v)) + (cauchy > 0 ? log1p(v / (cauchy * cauchy)) : 0.5 * log(v));
    return v;
}

/* Draws all factors, and returns their KL to the prior at its best scales, in nats.
 *
 * counts[s] says how many entries slice s governs, of which there are `slices`; two more numbers stand for the entries
 * of cores, of the fixed prior standard deviation `core_std`, and for those that nothing governs. cauchy is the scale
 * of a half-Cauchy prior, 0 for a log-uniform one. moments holds slices + 2 numbers of work; precision gets 1 / s^2 of
 * each. */
double draw(Size factors, const Place *places, const float *const *means, const float *const *log_stds, uint64_t seed,
            Size slices, const float *counts, double cauchy, double least, double core_std, double core_entries,
            double *moments, float *precision, float *drawn, float *away, float *variance)
{
    Noise noise = noise_from(seed);
    double kl = 0;
    Size entries = 0;
    memset(moments, 0, sizeof(double) * (slices + 2));
    for (Size k = 0; k < factors; k++) {
        const Place at = places[k];
        const Size its = at.before * at.rank * at.after;
        draw_all(its, means[k], log_stds[k], &noise, drawn + entries, away + entries, variance + entries);
        kl -= sum_of(its, log_stds[k]);
        const float *mean = means[k], *of = variance + entries;
        double *slice = moments + at.first;
        if (at.after == 1)
            moments_of(at.before, at.rank, mean, of, slice);
        else
            for (Size b = 0; b < at.before; b++)
                for (Size r = 0; r < at.rank; r++, mean += at.after, of += at.after)
                    slice[r] += moment_of(at.after, mean, of);
        entries += its;
    }
    for (Size s = 0; s < slices; s++) precision[s] = (float)(1 / scale_of(moments[s], counts[s], cauchy, least, &kl));
    precision[slices] = (float)(1 / (core_std * core_std));
    precision[slices + 1] = 0;
    kl += 0.5 * moments[slices] / (core_std * core_std) + core_entries * log(core_std);
    return kl - 0.5 * (double)entries;
}

/* What the gradients of some neighbours' draws and of the KL say of their means and log standard deviations. */
static inline void hand_on(Size i, Floats of_draw, float of_kl, Floats precision, const float *mean, const float *away,
                           const float *variance, float *of_mean, float *of_log_std)
{
    const Floats pull = of_kl * precision;
    *(Floats *)(of_mean + i) = of_draw + pull * *(const Floats *)(mean + i);
    *(Floats *)(of_log_std + i) =
        of_draw * *(const Floats *)(away + i) + (pull * *(const Floats *)(variance + i) - of_kl);
}

/* The same for `count` of them, whose precisions stand side by side or are all the first one. */
static void hand_on_all(Size count, const float *of_draw, float of_kl, const float *precision, int same,
                        const float *mean, const float *away, const float *variance, float *of_mean, float *of_log_std)
{
    Size i = 0;
    for (; i + LANES <= count; i += LANES) {
        Floats its = {0}, p = (Floats){0} + *precision;
        if (of_draw) its = *(const Floats *)(of_draw + i);
        if (!same) p = *(const Floats *)(precision + i);
        hand_on(i, its, of_kl, p, mean, away, variance, of_mean, of_log_std);
    }
    for (; i < count; i++) {
        const float its = of_draw ? of_draw[i] : 0, pull = of_kl * precision[same ? 0 : i];
        of_mean[i] = its + pull * mean[i];
        of_log_std[i] = its * away[i] + (pull * variance[i] - of_kl);
    }
}

/* Writes the gradients of all means, and of all log standard deviations, from those of the draws (NULL for zeros) and
 * that of the KL; `away`, `variance` and `precision` are what `draw` has left. */
void hand_on_gradients(Size factors, const Place *places, const float *const *means, const float *const *of_draws,
                       double of_kl, const float *precision, const float *away, const float *variance, float *of_means,
                       float *of_log_stds)
{
    Size n = 0;
    for (Size k = 0; k < factors; k++) {
        const Place at = places[k];
        const float *mean = means[k], *of_draw = of_draws[k], *its = precision + at.first;
        Size step = at.after == 1 ? at.rank : at.after, steps = at.before * (at.after == 1 ? 1 : at.rank);
        float repeated[MOST_SLICES * LANES];
        if (at.after == 1 && at.rank % LANES && at.rank <= MOST_SLICES) {
            /* LANES rows at once, which are whole registers; the precisions of them, and of what is left. */
            for (Size lane = 0; lane < LANES; lane++)
                memcpy(repeated + lane * at.rank, its, sizeof(float) * at.rank);
            its = repeated, step *= LANES, steps = (at.before + LANES - 1) / LANES;
        }
        for (Size s = 0, left = at.before * at.rank * at.after; s < steps; s++, n += step, mean += step, left -= step) {
            if (step > left) step = left;
            const float *p = at.after == 1 ? its : its + s % at.rank;
            hand_on_all(step, of_draw, (float)of_kl, p, at.after != 1, mean, away + n, variance + n, of_means + n,
                        of_log_stds + n);
            if (of_draw) of_draw += step;
        }
    }
}
