/* SPDX-License-Identifier: Apache-2.0
 *
 * Rows of a chain of factors, a TT-matrix or a tensor train, and their gradients: what the functions of _chain.py do by
 * many calls of torch, in one pass.
 *
 * A row is F_0[i_0] F_1[i_1] ... of its digits i_k, from left to right, two or more. Rows come sorted by the second
 * digit, then by the first one and by the others. So each product is made once for all rows that begin alike, and those
 * of the first two factors are one larger product for several first digits: F_1, which is often the largest factor, is
 * read, and its gradient added to, once for all of them. Factors stand as they do in Python, of shape (rank before,
 * digits, width, rank after), without the ranks at the ends; REAL is float or double.
 */
#include "_id_order.h"

/* C = A B.T, or C += A B.T, for B of shape (columns, inner); rows of A and of B stand side by side. */
static void product_of_rows(Size rows, Size columns, Size inner, Matrix A, Matrix B, REAL *c, Size c_down, int adds)
{
    const Size whole = inner / WIDE * WIDE;
    for (Size i = 0; i < rows; i += 4)
        for (Size j = 0; j < columns; j++) {
            const int some = rows - i < 4 ? (int)(rows - i) : 4;
            const REAL *b = B.start + j * B.down, *a[4];
            for (int n = 0; n < 4; n++) a[n] = A.start + (i + (n < some ? n : 0)) * A.down;
            Wide sum[4] = {{0}, {0}, {0}, {0}};
            for (Size k = 0; k < whole; k += WIDE) {
                const Wide side = *(const Wide *)(b + k);
                _Pragma("GCC unroll 4") for (int n = 0; n < 4; n++) sum[n] += *(const Wide *)(a[n] + k) * side;
            }
            _Pragma("GCC unroll 4") for (int n = 0; n < 4; n++)
            {
                REAL found = total(sum[n]);
                for (Size k = whole; k < inner; k++) found += a[n][k] * b[k];
                if (n < some) c[(i + n) * c_down + j] = found + (adds ? c[(i + n) * c_down + j] : 0);
            }
        }
}

enum { MOST_FACTORS = 16 };

/* A factor, and the product up to it for the row at hand. */
typedef struct {
    Size digits;    /* How many slices it has. */
    Size rank;      /* Of the bond before it. */
    Size across;    /* Its width x the rank after it. */
    Size before;    /* Columns of all factors before it. */
    Size later;     /* How many ids have their digits up to this factor in common, */
    Size beginning; /* and those digits behind the second one, which tell those apart that have not. */
    Size at;        /* Where the slice of the row begins in values. */
    const REAL *values;
    REAL *gradient;
    REAL *turned;  /* All slices transposed, if they are taken so often that this pays. */
    REAL *made;    /* The product, (before, across), */
    REAL *of_made; /* and its gradient, */
    int held;      /* if there is anything of it yet. */
} Part;

enum { MOST_IDS = 128, ROOM = 1 << 14 }; /* Ids of a block, and numbers that its products have, if one has no more. */

/* Ids that have their second digit in common, and the products of the first two factors for the first digits that they
 * have, one below the other. */
typedef struct {
    Size ids, firsts, second; /* How many, and the second digit. */
    Size first[MOST_IDS]; /* The first digits, in order. */
    Size slot[MOST_IDS];  /* Of each id the number of its first digit among them, */
    Size other[MOST_IDS]; /* and what is left of it behind the second one. */
    REAL *left, *of_left; /* The slices of the first factor, and their gradients. */
    REAL *made, *of_made; /* The products, and theirs. */
} Block;

typedef struct {
    Part part[MOST_FACTORS];
    Block block;
    Size factors, width;
    Size most;   /* First digits of a block. */
    Size second; /* Up to which second digit, it not included, the gradient of the second factor is there. */
    Packing packing;
    REAL *memory, *turned;
    const REAL *of_row; /* The gradient of the last product: where it was given, or where those of equal ids are. */
} Chain;

static inline Size least(Size a, Size b) { return a < b ? a : b; }

/* Returns 1 if there is no memory, else 0. */
static int begin(Chain *chain, Size factors, const Size *digits, const Size *widths, const Size *ranks,
                 const REAL *const *values, REAL *const *gradients)
{
    Size width = 1, later = 1, numbers = 1, largest = 0;
    for (Size k = 0; k < factors; k++) {
        const Size rank = k ? ranks[k - 1] : 1, across = widths[k] * ranks[k];
        chain->part[k] = (Part){.digits = digits[k], .rank = rank, .across = across, .before = width,
                                .values = values[k], .gradient = gradients ? gradients[k] : NULL};
        if (k > 1) numbers += 2 * width * across;
        largest = rank * across > largest ? rank * across : largest;
        width *= widths[k];
    }
    for (Size k = factors; k--; later *= digits[k]) chain->part[k].later = later;
    const Size of_first = chain->part[0].across, of_both = widths[0] * chain->part[1].across;
    const Size most = ROOM / (of_first + of_both + 1);
    chain->factors = factors, chain->width = width, chain->most = most < 1 ? 1 : least(most, MOST_IDS);
    chain->second = 0, chain->packing = packing_of(digits[0], digits[1], chain->part[1].later);
    numbers += 2 * chain->most * (of_first + of_both);
    REAL *next = chain->memory = malloc(sizeof(REAL) * (numbers + largest));
    if (!next) return 1;
    REAL **const parts[] = {&chain->block.left, &chain->block.of_left, &chain->block.made, &chain->block.of_made};
    for (int k = 0; k < 4; k++) *parts[k] = next, next += chain->most * (k < 2 ? of_first : of_both);
    for (Part *part = chain->part + 2; part < chain->part + factors; part++) {
        const Size its = part->before * part->across;
        part->made = next, part->of_made = next + its;
        next += 2 * its;
    }
    chain->turned = next;
    return 0;
}

enum { OFTEN = 8 }; /* Times that each slice is taken. */

/* Returns 1 if there is no memory, else 0. */
static int turn(Chain *chain, Size count)
{
    for (Part *part = chain->part + 2; part < chain->part + chain->factors; part++) {
        const Size slices = part->digits * part->across;
        if (count < OFTEN * part->digits) continue;
        part->turned = malloc(sizeof(REAL) * (slices * part->rank + 1));
        if (!part->turned) return 1;
        turn_over(part->rank, slices, part->values, slices, part->turned, part->rank);
    }
    return 0;
}

static void end(Chain *chain)
{
    for (Part *part = chain->part + 2; part < chain->part + chain->factors; part++) free(part->turned);
    free(chain->memory);
}

/* The next ids that have their second digit in common, and no more first digits than there is room for. */
static void next_block(Chain *chain, Size count, const Entry *order)
{
    Block *block = &chain->block;
    const Part *first = chain->part, *second = first + 1;
    const Packing *packing = &chain->packing;
    Size last = -1, digit = -1;
    block->firsts = 0, block->ids = 0;
    for (; block->ids < least(count, MOST_IDS); block->ids++) {
        const uint64_t key = order[block->ids].key;
        const Size its = first_in(packing, key), its_second = second_in(packing, key);
        if (digit >= 0 && its_second != digit) break;
        digit = its_second;
        if (its != last) {
            if (block->firsts == chain->most) break;
            copy(first->across, first->values + its * first->across, block->left + block->firsts * first->across);
            block->first[block->firsts++] = last = its;
        }
        block->slot[block->ids] = block->firsts - 1;
        block->other[block->ids] = other_in(packing, key);
    }
    block->second = digit, chain->part[1].at = digit * second->across;
}

/* The products of its first two factors: made, where they are kept, if some are; or if they are `there`, taken from
 * there. */
static void make_block(Chain *chain, REAL **kept, int there)
{
    Block *block = &chain->block;
    const Part *part = chain->part + 1;
    if (*kept) block->made = *kept, *kept += block->firsts * part->before * part->across;
    if (*kept && there) return;
    const Matrix left = {block->left, part->rank, 1};
    const Matrix right = {part->values + part->at, part->digits * part->across, 1};
    product(block->firsts * part->before, part->across, part->rank, left, right, block->made, part->across, 0);
}

/* The digits up to a factor, the first two aside. */
static inline Size beginning_of(const Part *part, Size other)
{
    return part->later == 1 ? other : other / part->later; /* Divisions take long. */
}

/* The factor after the first two from which on an id of a block differs from the one before; 1 if it does so earlier,
 * and their number if it is the same. */
static Size first_new(const Chain *chain, Size number)
{
    const Block *block = &chain->block;
    if (!number || block->slot[number] != block->slot[number - 1]) return 1;
    Size k = chain->factors;
    while (k > 2 && chain->part[k - 1].beginning != beginning_of(chain->part + k - 1, block->other[number])) k--;
    return k;
}

/* The products for an id of a block, of whose factors those before `from` are at hand; the last one, its row, if
 * `whole`, which is known where this is inlined. */
static inline __attribute__((always_inline)) void make(Chain *chain, Size number, Size from, int whole)
{
    const Block *block = &chain->block;
    Part *second = chain->part + 1;
    const Size start = block->slot[number] * second->before * second->across;
    second->made = block->made + start, second->of_made = block->of_made + start;
    for (Size k = from < 2 ? 2 : from; k < chain->factors; k++) {
        Part *part = chain->part + k;
        part->beginning = beginning_of(part, block->other[number]);
        part->at = (k > 2 ? part->beginning % part->digits : part->beginning) * part->across;
        if (k + 1 == chain->factors && !whole) return;
        const Matrix left = {part[-1].made, part->rank, 1};
        const Matrix right = {part->values + part->at, part->digits * part->across, 1};
        product(part->before, part->across, part->rank, left, right, part->made, part->across, 0);
    }
}

/* The row of each id in `order`, as order_of gives it, goes to row k of `out`, k its number. Or where there are places,
 * weights[k] times it is added to row places[k], which holds zeros at first. Without weights they are 1. The products
 * of the first two factors are written to `kept`, if it is not NULL: one for each id at most. Returns 0, or 1 if there
 * is no memory. */
int rows(Size count, const Entry *order, const Size *places, const REAL *weights, Size factors, const Size *digits,
         const Size *widths, const Size *ranks, const REAL *const *values, REAL *out, REAL *kept)
{
    Chain chain;
    if (begin(&chain, factors, digits, widths, ranks, values, NULL)) return 1;
    const Size width = chain.width;
    const int in_place = !places && factors > 2;
    Part *last = chain.part + factors - 1;
    for (Size at = 0; at < count; at += chain.block.ids) {
        next_block(&chain, count - at, order + at);
        make_block(&chain, &kept, 0);
        for (Size n = 0; n < chain.block.ids; n++) {
            const Size k = order[at + n].number, from = first_new(&chain, n);
            ask_for_row(at + n, count, order, places, out, width);
            REAL *to = out + (places ? places[k] : k) * width;
            if (in_place && from < factors) last->made = to;
            make(&chain, n, from, 1);
            if (places)
                add(width, weights ? weights[k] : 1, last->made, to);
            else if (last->made != to)
                copy(width, last->made, to);
        }
    }
    free(chain.memory);
    return 0;
}

/* Nothing in some slices of a factor's gradient. */
static void clear(const Part *part, Size from, Size to)
{
    const Size down = part->digits * part->across;
    for (Size i = 0; i < part->rank && to > from && part->across; i++)
        memset(part->gradient + i * down + from * part->across, 0, sizeof(REAL) * (to - from) * part->across);
}

/* Hands the gradient of a product with a factor, of `before` rows, on to the factor, where it is added if `adds`, and
 * to what stands on its left, where it is added if `adds_left`. */
static void hand_on(Chain *chain, const Part *part, Size before, const REAL *gradient, const REAL *left_of_it,
                    REAL *of_left, int adds, int adds_left)
{
    const Size across = part->across, down = part->digits * across;
    REAL *of_slice = part->gradient + part->at;
    const Matrix of_made = {gradient, across, 1}, turned = {chain->turned, part->rank, 1};
    if (across < 8 && part->rank > across) {
        const Matrix side = {gradient, 1, across}, left = {left_of_it, part->rank, 1};
        product(across, part->rank, before, side, left, chain->turned, part->rank, 0);
        for (Size i = 0; i < part->rank; i++)
            for (Size j = 0; j < across; j++)
                of_slice[i * down + j] = chain->turned[j * part->rank + i] + (adds ? of_slice[i * down + j] : 0);
    } else {
        const Matrix left = {left_of_it, 1, part->rank};
        product(part->rank, across, before, left, of_made, of_slice, down, adds);
    }
    if (part->turned) {
        const Matrix slice = {part->turned + part->at * part->rank, part->rank, 1};
        product(before, part->rank, across, of_made, slice, of_left, part->rank, adds_left);
    } else if (across >= 8 * before) {
        const Matrix slice = {part->values + part->at, down, 1};
        product_of_rows(before, part->rank, across, of_made, slice, of_left, part->rank, adds_left);
    } else {
        turn_over(part->rank, across, part->values + part->at, down, chain->turned, part->rank);
        product(before, part->rank, across, of_made, turned, of_left, part->rank, adds_left);
    }
}

/* The same for an id of a block and its factors from one on, the first two aside. */
static void hand_on_from(Chain *chain, Size from)
{
    for (Size k = chain->factors; k-- > 2 && k >= from;) {
        Part *part = chain->part + k;
        const REAL *gradient = k + 1 == chain->factors ? chain->of_row : part->of_made;
        hand_on(chain, part, part->before, gradient, part[-1].made, part[-1].of_made, 1, part[-1].held);
        part[-1].held = 1, part->held = 0;
    }
    if (from < 2) chain->part[1].held = 0;
}

/* The same for a block and its first two factors. Second digits rise, so nothing is read where nothing is yet. */
static void hand_on_block(Chain *chain)
{
    const Block *block = &chain->block;
    const Part *first = chain->part, *second = first + 1;
    const int adds = block->second < chain->second;
    if (!adds) clear(second, chain->second, block->second), chain->second = block->second + 1;
    hand_on(chain, second, block->firsts * second->before, block->of_made, block->left, block->of_left, adds, 0);
    for (Size n = 0; n < block->firsts; n++)
        add(first->across, 1, block->of_left + n * first->across, first->gradient + block->first[n] * first->across);
}

/* Takes the gradient of a row, times a weight if there is one, for its id. An id that comes once needs no copy. */
static inline void take(Chain *chain, Part *last, const REAL *weight, const REAL *its)
{
    const REAL factor = weight ? *weight : 1;
    if (last->held) {
        if (chain->of_row != last->of_made) copy(chain->width, chain->of_row, last->of_made);
        add(chain->width, factor, its, last->of_made);
    } else if (weight || chain->factors == 2) /* Of two factors, gradients of a block have to lie below each other. */
        put(chain->width, factor, its, last->of_made);
    chain->of_row = last->held || weight || chain->factors == 2 ? last->of_made : its;
    last->held = 1;
}

/* Writes to `gradients`, of the shapes of the factors, what the gradient of `out` has to say of them; and that of the
 * weights, where it is asked for. If `kept` is not NULL, it holds what `rows` has written there. */
int gradients_of_rows(Size count, const Entry *order, const Size *places, const REAL *weights, Size factors,
                      const Size *digits, const Size *widths, const Size *ranks, const REAL *const *values,
                      const REAL *gradient, REAL *const *gradients, REAL *of_weights, REAL *kept)
{
    Chain chain;
    if (begin(&chain, factors, digits, widths, ranks, values, gradients)) return 1;
    if (turn(&chain, count)) {
        end(&chain);
        return 1;
    }
    const Size width = chain.width;
    Part *last = chain.part + factors - 1;
    for (Size k = 0; k < factors; k++)
        if (k != 1) clear(chain.part + k, 0, digits[k]);
    for (Size at = 0; at < count; at += chain.block.ids) {
        next_block(&chain, count - at, order + at);
        if (factors > 2 || of_weights) make_block(&chain, &kept, 1);
        for (Size n = 0; n < chain.block.ids; n++) {
            const Size k = order[at + n].number, from = first_new(&chain, n);
            const REAL *its = gradient + (places ? places[k] : k) * width;
            ask_for_row(at + n, count, order, places, gradient, width);
            if (n) hand_on_from(&chain, from);
            make(&chain, n, from, of_weights != NULL);
            take(&chain, last, weights ? weights + k : NULL, its);
            if (of_weights) of_weights[k] = dot(width, its, last->made);
        }
        hand_on_from(&chain, 1);
        hand_on_block(&chain);
    }
    clear(chain.part + 1, chain.second, digits[1]);
    end(&chain);
    return 0;
}

/* As sort_ids says. */
Size order_of(Size count, const Size *ids, const Size *places, Size factors, const Size *digits, Entry *order)
{
    Size others = 1;
    for (Size k = 2; k < factors; k++) others *= digits[k];
    return sort_ids(count, ids, places, packing_of(digits[0], digits[1], others), order);
}
