/* SPDX-License-Identifier: Apache-2.0
 *
 * Rows of a chain of factors, a TT-matrix or a tensor train, and their gradients: what the functions of _chain.py do by
 * many calls of torch, in one pass.
 *
 * A row is F_0[i_0] F_1[i_1] ... of its digits i_k, from left to right. Rows come sorted, so neighbours have digits in
 * common, and each product is made once for all rows that begin alike. Factors stand as they do in Python, of shape
 * (rank before, digits, width, rank after), without the ranks at the ends; REAL is float or double.
 */
#include "_row_blocks.h"

static inline REAL total(Wide v)
{
    REAL sum = 0;
    for (int lane = 0; lane < WIDE; lane++) sum += v[lane];
    return sum;
}

/* C += A B.T, for B of shape (columns, inner); rows of A and of B stand side by side. */
static void product_of_rows(Size rows, Size columns, Size inner, Matrix A, Matrix B, REAL *c, Size c_down)
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
                if (n < some) c[(i + n) * c_down + j] += found;
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
    Size beginning; /* and id / later, which tells those apart that have not. */
    Size at;        /* Where the slice of the row begins in values. */
    const REAL *values;
    REAL *gradient;
    REAL *turned;  /* All slices transposed, if they are taken so often that this pays. */
    REAL *made;    /* The product, (before, across), */
    REAL *of_made; /* and its gradient. */
} Part;

typedef struct {
    Part part[MOST_FACTORS];
    Size factors, width;
    REAL *memory, *turned;
} Chain;

/* Returns 1 if there is no memory, else 0. */
static int begin(Chain *chain, Size factors, const Size *digits, const Size *widths, const Size *ranks,
                 const REAL *const *values, REAL *const *gradients)
{
    Size width = 1, later = 1, numbers = 1, most = 0;
    for (Size k = 0; k < factors; k++) {
        const Size rank = k ? ranks[k - 1] : 1, across = widths[k] * ranks[k];
        chain->part[k] = (Part){.digits = digits[k], .rank = rank, .across = across, .before = width,
                                .values = values[k], .gradient = gradients ? gradients[k] : NULL, .beginning = -1};
        numbers += 2 * width * across;
        most = rank * across > most ? rank * across : most;
        width *= widths[k];
    }
    for (Size k = factors; k--; later *= digits[k]) chain->part[k].later = later;
    chain->factors = factors, chain->width = width;
    REAL *next = chain->memory = malloc(sizeof(REAL) * (numbers + most));
    if (!next) return 1;
    for (Part *part = chain->part; part < chain->part + factors; part++) {
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
    for (Part *part = chain->part + 1; part < chain->part + chain->factors; part++) {
        const Size slices = part->digits * part->across;
        if (count < OFTEN * part->digits) continue;
        part->turned = malloc(sizeof(REAL) * (slices * part->rank + 1));
        if (!part->turned) return 1;
        for (Size j = 0; j < slices; j++)
            for (Size i = 0; i < part->rank; i++) part->turned[j * part->rank + i] = part->values[i * slices + j];
    }
    return 0;
}

static void end(Chain *chain)
{
    for (Part *part = chain->part; part < chain->part + chain->factors; part++) free(part->turned);
    free(chain->memory);
}

/* The first factor from which on a row differs from the last one; their number if it is the same. */
static Size first_new(const Chain *chain, Size id)
{
    Size k = chain->factors;
    while (k && chain->part[k - 1].beginning != id / chain->part[k - 1].later) k--;
    return k;
}

/* The products for an id, of whose factors those before `from` are at hand; the last one, its row, if `whole`, which is
 * known where this is inlined. */
static inline __attribute__((always_inline)) void make(Chain *chain, Size id, Size from, int whole)
{
    for (Size k = from; k < chain->factors; k++) {
        Part *part = chain->part + k;
        part->beginning = id / part->later;
        part->at = part->beginning % part->digits * part->across;
        if (k + 1 == chain->factors && !whole) return;
        const REAL *slice = part->values + part->at;
        if (!k) {
            for (Size j = 0; j < part->across; j++) part->made[j] = slice[j];
            continue;
        }
        const Matrix left = {part[-1].made, part->rank, 1}, right = {slice, part->digits * part->across, 1};
        product(part->before, part->across, part->rank, left, right, part->made, part->across, 0);
    }
}

/* Row ids[k] for each k in `order`, which sorts ids, goes to row k of `out`. Or where there are places, weights[k]
 * times it is added to row places[k], which holds zeros at first; not if that is less than 0. Without weights they are
 * 1. Returns 0, or 1 if there is no memory. */
int rows(Size count, const Size *order, const Size *ids, const Size *places, const REAL *weights, Size factors,
         const Size *digits, const Size *widths, const Size *ranks, const REAL *const *values, REAL *out)
{
    Chain chain;
    if (begin(&chain, factors, digits, widths, ranks, values, NULL)) return 1;
    const Size width = chain.width;
    const REAL *row = chain.part[factors - 1].made;
    for (Size n = 0; n < count; n++) {
        const Size k = order[n], place = places ? places[k] : k;
        ask_for_row(n, count, order, places, out, width);
        if (place < 0) continue;
        make(&chain, ids[k], first_new(&chain, ids[k]), 1);
        REAL *to = out + place * width;
        if (places)
            add(width, weights ? weights[k] : 1, row, to);
        else
            memcpy(to, row, sizeof(REAL) * width);
    }
    free(chain.memory);
    return 0;
}

/* Hands the gradient of a product on to its last factor, and to the product before that. */
static void hand_on(Chain *chain, Part *part)
{
    const Size across = part->across, down = part->digits * across;
    REAL *of_slice = part->gradient + part->at;
    if (part == chain->part) {
        for (Size j = 0; j < across; j++) of_slice[j] += part->of_made[j];
    } else {
        const Matrix of_made = {part->of_made, across, 1}, turned = {chain->turned, part->rank, 1};
        if (across < 8 && part->rank > across) {
            const Matrix side = {part->of_made, 1, across}, left = {part[-1].made, part->rank, 1};
            product(across, part->rank, part->before, side, left, chain->turned, part->rank, 0);
            for (Size i = 0; i < part->rank; i++)
                for (Size j = 0; j < across; j++) of_slice[i * down + j] += chain->turned[j * part->rank + i];
        } else {
            const Matrix left = {part[-1].made, 1, part->rank};
            product(part->rank, across, part->before, left, of_made, of_slice, down, 1);
        }
        if (part->turned) {
            const Matrix slice = {part->turned + part->at * part->rank, part->rank, 1};
            product(part->before, part->rank, across, of_made, slice, part[-1].of_made, part->rank, 1);
        } else if (across >= 8 * part->before) {
            const Matrix slice = {part->values + part->at, down, 1};
            product_of_rows(part->before, part->rank, across, of_made, slice, part[-1].of_made, part->rank);
        } else {
            const REAL *slice = part->values + part->at;
            for (Size i = 0; i < part->rank; i++)
                for (Size j = 0; j < across; j++) chain->turned[j * part->rank + i] = slice[i * down + j];
            product(part->before, part->rank, across, of_made, turned, part[-1].of_made, part->rank, 1);
        }
    }
    memset(part->of_made, 0, sizeof(REAL) * part->before * across);
}

/* Adds to `gradients`, of the shapes of the factors, what the gradient of `out` has to say of them; and writes that of
 * the weights, where it is asked for. */
int gradients_of_rows(Size count, const Size *order, const Size *ids, const Size *places, const REAL *weights,
                      Size factors, const Size *digits, const Size *widths, const Size *ranks,
                      const REAL *const *values, const REAL *gradient, REAL *const *gradients, REAL *of_weights)
{
    Chain chain;
    if (begin(&chain, factors, digits, widths, ranks, values, gradients)) return 1;
    if (turn(&chain, count)) {
        end(&chain);
        return 1;
    }
    const Size width = chain.width;
    Part *last = chain.part + factors - 1;
    for (Part *part = chain.part; part <= last; part++)
        memset(part->of_made, 0, sizeof(REAL) * part->before * part->across);
    int begun = 0;
    for (Size n = 0; n < count; n++) {
        const Size k = order[n], place = places ? places[k] : k;
        ask_for_row(n, count, order, places, gradient, width);
        if (place < 0) continue;
        const Size from = first_new(&chain, ids[k]);
        if (begun)
            for (Size j = factors; j-- > from;) hand_on(&chain, chain.part + j);
        make(&chain, ids[k], from, of_weights != NULL);
        begun = 1;
        const REAL *its = gradient + place * width;
        add(width, weights ? weights[k] : 1, its, last->of_made);
        if (of_weights) {
            of_weights[k] = 0;
            for (Size j = 0; j < width; j++) of_weights[k] += its[j] * last->made[j];
        }
    }
    if (begun)
        for (Size j = factors; j--;) hand_on(&chain, chain.part + j);
    end(&chain);
    return 0;
}
