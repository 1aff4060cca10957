/* SPDX-License-Identifier: Apache-2.0
 *
 * The order in which ids are gone through.
 */
#pragma once
#include "_row_blocks.h"

/* An id, and which of them it is. Its key has its second digit in the highest bits, then the first one, then what is
 * left of it, so that who reads the digits again need not divide. */
typedef struct {
    uint64_t key;
    Size number;
} Entry;

/* An id is (first * seconds + second) * others + what is left; in a key `first` and `second` are where those begin. */
typedef struct {
    Size seconds, others;
    int first, second, bits;
} Packing;

static int bits_of(Size digits) { return digits > 1 ? 64 - __builtin_clzll((uint64_t)digits - 1) : 0; }

/* All in all there are less than 2^61 ids, so that keys have at most 63 bits. */
static Packing packing_of(Size firsts, Size seconds, Size others)
{
    const int first = bits_of(others), second = first + bits_of(firsts);
    return (Packing){seconds, others, first, second, second + bits_of(seconds)};
}

static inline Size second_in(const Packing *packing, uint64_t key) { return (Size)(key >> packing->second); }

static inline Size first_in(const Packing *packing, uint64_t key)
{
    return (Size)(key >> packing->first & (((uint64_t)1 << (packing->second - packing->first)) - 1));
}

static inline Size other_in(const Packing *packing, uint64_t key)
{
    return (Size)(key & (((uint64_t)1 << packing->first) - 1));
}

/* The whole quotient; of numbers below 2^52 by the inverse, in a fraction of the time, which is at most 1 off. */
static inline Size quotient(Size number, Size by, double inverse)
{
    if (number >= (Size)1 << 52) return number / by;
    const Size found = (Size)((double)number * inverse), rest = number - found * by;
    return found + (rest >= by) - (rest < 0);
}

enum { MOST_BITS = 11 }; /* Of a key that entries are told apart by at once. */

/* Puts entries in the order of `bits` bits of their keys, others aside as they stand. */
static void sort_by_bits(Size count, const Entry *from, Entry *to, int shift, int bits)
{
    Size next[1 << MOST_BITS] = {0}, sum = 0;
    const Size values = (Size)1 << bits;
    for (Size n = 0; n < count; n++) next[from[n].key >> shift & (values - 1)]++;
    for (Size value = 0; value < values; value++) {
        const Size its = next[value];
        next[value] = sum, sum += its;
    }
    for (Size n = 0; n < count; n++) to[next[from[n].key >> shift & (values - 1)]++] = from[n];
}

/* Writes the ids that have a place, without places all, to `order`, which has room for all: sorted by their keys, equal
 * ones as they stand. Returns how many there are, or -1 if there is no memory. */
static Size sort_ids(Size count, const Size *ids, const Size *places, Packing packing, Entry *order)
{
    Entry *const memory = malloc(sizeof(Entry) * (count + 1));
    if (!memory) return -1;
    const int steps = (packing.bits + MOST_BITS - 1) / MOST_BITS;
    Entry *from = steps % 2 ? memory : order, *to = steps % 2 ? order : memory; /* Ends in `order`. */
    const double of_others = 1.0 / (double)packing.others, of_seconds = 1.0 / (double)packing.seconds;
    Size kept = 0;
    for (Size k = 0; k < count; k++) {
        if (places && places[k] < 0) continue;
        const Size beginning = quotient(ids[k], packing.others, of_others);
        const Size first = quotient(beginning, packing.seconds, of_seconds);
        const Size second = beginning - first * packing.seconds, other = ids[k] - beginning * packing.others;
        const uint64_t key = (uint64_t)second << packing.second | (uint64_t)first << packing.first | (uint64_t)other;
        from[kept++] = (Entry){key, k};
    }
    for (int step = 0; step < steps; step++) {
        const int shift = packing.bits * step / steps, end = packing.bits * (step + 1) / steps;
        sort_by_bits(kept, from, to, shift, end - shift);
        Entry *const sorted = to;
        to = from, from = sorted;
    }
    free(memory);
    return kept;
}

/* Rows may stand anywhere in memory, which is asked for those that are wanted soon. Compilers leave out calls of such
 * functions, which change nothing, unless they are inlined before that is found out. */
enum { AHEAD = 2 };

static inline __attribute__((always_inline)) void ask_for_row(
    Size n, Size end, const Entry *order, const Size *places, const REAL *table, Size width)
{
    if (n + AHEAD >= end) return;
    const Size k = order[n + AHEAD].number, place = places ? places[k] : k;
    for (Size j = 0; j < width; j += 64 / sizeof(REAL)) __builtin_prefetch(table + place * width + j);
}
