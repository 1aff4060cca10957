/* SPDX-License-Identifier: Apache-2.0
 *
 * Rows of a table that is a product of two factors, and their gradients: the table is made block by block, and what is
 * wanted of a block is taken while it is in the cache. No more than a block of it, or of its gradient, is ever there.
 *
 * Factors stand as they do in _sorted_rows.c, L of shape (heads, before, rank) and R of shape (rank, tails, after), and
 * row head * tails + tail is L[head] R[:, tail], of before * after numbers. Neighbours among sorted rows have the same
 * head. A block is L of some heads times all of R.
 */
#include "_id_order.h"

enum { ROOM = 1 << 15 }; /* Numbers that a block has, if one head has no more. */

typedef struct {
    Size before, rank, tails, after, columns;
    Size down;   /* From a row of a block, or of R, to the next: not by a power of two, where caches lose them. */
    Size padded; /* The rank in whole registers. */
    Size most;   /* Heads of a block. */
    Packing packing;
    REAL *memory, *left, *right, *turned, *made, *of_left, *of_right, *of_made;
} Table;

static inline Size whole(Size count, Size of) { return (count + of - 1) / of * of; }

/* Returns 1 if there is no memory, else 0. */
static int begin(Table *t, const Size *digits, const Size *widths, const Size *ranks, const REAL *right, int learns)
{
    *t = (Table){.before = widths[0], .rank = ranks[0], .tails = digits[1], .after = widths[1]};
    t->packing = packing_of(digits[0], 1, digits[1]);
    t->columns = t->tails * t->after;
    t->down = whole(t->columns, 16) + 16, t->padded = whole(t->rank, 8);
    t->most = ROOM / (t->before * t->down) > 1 ? ROOM / (t->before * t->down) : 1;
    const Size rows = t->most * t->before;
    const Size sizes[] = {rows * t->padded, t->rank * t->down, rows * t->down, t->columns * t->padded,
                          rows * t->padded, t->padded * t->down, rows * t->down};
    REAL **const parts[] = {&t->left, &t->right, &t->made, &t->turned, &t->of_left, &t->of_right, &t->of_made};
    const int count = learns ? 7 : 3;
    Size numbers = 0;
    for (int k = 0; k < count; k++) numbers += whole(sizes[k], 16);
    REAL *next = t->memory = aligned_alloc(16 * sizeof(REAL), sizeof(REAL) * numbers);
    if (!next) return 1;
    for (int k = 0; k < count; next += whole(sizes[k++], 16)) *parts[k] = next;
    memset(t->left, 0, sizeof(REAL) * sizes[0]);
    for (Size i = 0; i < t->rank; i++) copy(t->columns, right + i * t->columns, t->right + i * t->down);
    if (!learns) return 0;
    memset(t->turned, 0, sizeof(REAL) * sizes[3]);
    turn_over(t->rank, t->columns, right, t->columns, t->turned, t->padded);
    memset(t->of_right, 0, sizeof(REAL) * sizes[5]);
    return 0;
}

/* Some ids in their order, from `at` up to `end`, and the heads that they have. */
typedef struct {
    Size at, end, heads;
} Block;

/* The ids of the next heads, whose rows of L are gathered. */
static Block next_block(Table *t, Size at, Size count, const Entry *order, const REAL *left)
{
    Block block = {at, at, 0};
    for (Size last = -1; block.end < count; block.end++) {
        const Size head = first_in(&t->packing, order[block.end].key);
        if (head == last) continue;
        if (block.heads == t->most) break;
        for (Size b = 0; b < t->before; b++)
            copy(t->rank, left + (head * t->before + b) * t->rank,
                 t->left + (block.heads * t->before + b) * t->padded);
        last = head, block.heads++;
    }
    return block;
}

static void make(Table *t, Size heads)
{
    const Matrix left = {t->left, t->padded, 1}, right = {t->right, t->down, 1};
    product(heads * t->before, t->columns, t->rank, left, right, t->made, t->down, 0);
}

/* Where in a block the row of an id begins, after that of another; `slot` is the number of its head there. */
static inline Size place_in(const Table *t, uint64_t key, Size *slot, Size *last)
{
    const Size head = first_in(&t->packing, key);
    if (head != *last) ++*slot, *last = head;
    return *slot * t->before * t->down + other_in(&t->packing, key) * t->after;
}

/* As in _sorted_rows.c, of two factors; nothing is kept. */
int rows(Size count, const Entry *order, const Size *places, const REAL *weights, Size factors, const Size *digits,
         const Size *widths, const Size *ranks, const REAL *const *values, REAL *out, REAL *kept)
{
    Table t;
    (void)kept;
    if (factors != 2 || begin(&t, digits, widths, ranks, values[1], 0)) return 1;
    const Size width = t.before * t.after;
    for (Block block = {0}; block.end < count;) {
        block = next_block(&t, block.end, count, order, values[0]);
        make(&t, block.heads);
        Size slot = -1, last = -1;
        for (Size n = block.at; n < block.end; n++) {
            const Size k = order[n].number, place = places ? places[k] : k;
            const REAL *from = t.made + place_in(&t, order[n].key, &slot, &last);
            ask_for_row(n, block.end, order, places, out, width);
            REAL *to = out + place * width;
            for (Size b = 0; b < t.before; b++, from += t.down, to += t.after)
                if (places)
                    add(t.after, weights ? weights[k] : 1, from, to);
                else
                    copy(t.after, from, to);
        }
    }
    free(t.memory);
    return 0;
}

/* Adds up the gradients of a block's rows; and writes those of weights, for which the block has been made. */
static void gather(Table *t, Block block, const Entry *order, const Size *places, const REAL *weights,
                   const REAL *gradient, REAL *of_weights)
{
    const Size width = t->before * t->after;
    memset(t->of_made, 0, sizeof(REAL) * block.heads * t->before * t->down);
    Size slot = -1, last = -1;
    for (Size n = block.at; n < block.end; n++) {
        const Size k = order[n].number, place = places ? places[k] : k;
        const Size start = place_in(t, order[n].key, &slot, &last);
        ask_for_row(n, block.end, order, places, gradient, width);
        const REAL *from = gradient + place * width;
        for (Size b = 0; b < t->before; b++, from += t->after) {
            add(t->after, weights ? weights[k] : 1, from, t->of_made + start + b * t->down);
            if (of_weights) of_weights[k] += dot(t->after, from, t->made + start + b * t->down);
        }
    }
}

/* As in _sorted_rows.c, of two factors; `of_weights` holds zeros at first. */
int gradients_of_rows(Size count, const Entry *order, const Size *places, const REAL *weights, Size factors,
                      const Size *digits, const Size *widths, const Size *ranks, const REAL *const *values,
                      const REAL *gradient, REAL *const *gradients, REAL *of_weights, REAL *kept)
{
    Table t;
    (void)kept;
    if (factors != 2 || begin(&t, digits, widths, ranks, values[1], 1)) return 1;
    if (t.rank) memset(gradients[0], 0, sizeof(REAL) * digits[0] * t.before * t.rank);
    for (Block block = {0}; block.end < count;) {
        block = next_block(&t, block.end, count, order, values[0]);
        if (of_weights) make(&t, block.heads);
        gather(&t, block, order, places, weights, gradient, of_weights);
        const Size rows = block.heads * t.before;
        const Matrix left = {t.left, 1, t.padded}, of_made = {t.of_made, t.down, 1}, turned = {t.turned, t.padded, 1};
        product(whole(t.rank, 2), t.columns, rows, left, of_made, t.of_right, t.down, 1);
        product(rows, t.padded, t.columns, of_made, turned, t.of_left, t.padded, 0);
        Size slot = -1, last = -1;
        for (Size n = block.at; n < block.end; n++) {
            const Size head = first_in(&t.packing, order[n].key);
            if (head == last) continue;
            slot++, last = head;
            for (Size b = 0; b < t.before; b++)
                copy(t.rank, t.of_left + (slot * t.before + b) * t.padded,
                     gradients[0] + (head * t.before + b) * t.rank);
        }
    }
    for (Size i = 0; i < t.rank; i++) copy(t.columns, t.of_right + i * t.down, gradients[1] + i * t.columns);
    free(t.memory);
    return 0;
}

/* Sorted as they are, by their heads. */
Size order_of(Size count, const Size *ids, const Size *places, Size factors, const Size *digits, Entry *order)
{
    (void)factors;
    return sort_ids(count, ids, places, packing_of(digits[0], 1, digits[1]), order);
}
