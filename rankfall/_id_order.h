/* SPDX-License-Identifier: Apache-2.0
 *
 * The order in which ids are gone through.
 */
#pragma once
#include "_row_blocks.h"

typedef struct {
    uint64_t key;
    Size number; /* Of the id. */
} Entry;

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

/* Writes the numbers of the ids that have a place, without places of all, to `order`: sorted by the second digit of an
 * id, those alike there by the first one, then by what is left; equal ids as they stand. An id is
 * (first * seconds + second) * others + what is left. Returns how many there are, or -1 if there is no memory. */
static Size sort_ids(Size count, const Size *ids, const Size *places, Size firsts, Size seconds, Size others,
                     Size *order)
{
    Entry *const memory = malloc(sizeof(Entry) * (2 * count + 1)), *from = memory, *to = memory + count;
    if (!memory) return -1;
    uint64_t found = 0;
    Size kept = 0;
    for (Size k = 0; k < count; k++) {
        if (places && places[k] < 0) continue;
        const Size beginning = ids[k] / others, first = beginning / seconds, second = beginning - first * seconds;
        const uint64_t key = (uint64_t)(second * firsts + first) * others + (ids[k] - beginning * others);
        from[kept++] = (Entry){key, k};
        found |= key;
    }
    const int length = found ? 64 - __builtin_clzll(found) : 0, steps = (length + MOST_BITS - 1) / MOST_BITS;
    for (int step = 0; step < steps; step++) {
        const int shift = length * step / steps, end = length * (step + 1) / steps;
        sort_by_bits(kept, from, to, shift, end - shift);
        Entry *const sorted = to;
        to = from, from = sorted;
    }
    for (Size n = 0; n < kept; n++) order[n] = from[n].number;
    free(memory);
    return kept;
}
