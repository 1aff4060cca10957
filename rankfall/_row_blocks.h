/* SPDX-License-Identifier: Apache-2.0
 *
 * Products of small matrices by blocks that are held in registers, for the functions that read rows of tables. REAL is
 * float or double.
 */
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif

typedef int64_t Size;
/* How many numbers stand side by side in a register, if they are float; how many rows of 16 there is room for, beside
 * what they are made of; and from how many rows of B they are made before the next 16 columns are begun, so that those
 * rows stay in the nearest cache. */
#ifdef __AVX512F__
enum { WIDE = 16, ROWS = 8, DEEP = 256 };
#else
enum { WIDE = 8, ROWS = 6, DEEP = 256 };
#endif
/* Numbers that stand side by side, at any address. */
typedef REAL Wide __attribute__((vector_size(WIDE * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef REAL By8 __attribute__((vector_size(8 * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef REAL By4 __attribute__((vector_size(4 * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef REAL By1;

/* A matrix whose element (i, j) stands at start[i * down + j * across]. */
typedef struct {
    const REAL *start;
    Size down, across;
} Matrix;

/* Some rows and columns of C = A B, or of C += A B, held in registers; the columns of B and C stand side by side. Each
 * row has `across` of them. C is first read at the end, lest registers hold where it stands. */
#define BLOCK(NAME, V)                                                                                      \
    static inline __attribute__((always_inline)) void NAME(                                                 \
        const int rows, const int across, Size inner, const REAL *a, Matrix A, const REAL *b, Size down,    \
        REAL *c, Size c_down, int adds)                                                                     \
    {                                                                                                       \
        enum { LANES = sizeof(V) / sizeof(REAL) };                                                          \
        V sum[12];                                                                                          \
        _Pragma("GCC unroll 12") for (int i = 0; i < rows * across; i++) sum[i] = (V){0};                   \
        for (Size k = 0; k < inner; k++, a += A.across, b += down) {                                        \
            V side[2];                                                                                      \
            _Pragma("GCC unroll 2") for (int n = 0; n < across; n++) side[n] = *(const V *)(b + n * LANES); \
            _Pragma("GCC unroll 12") for (int i = 0; i < rows * across; i++)                                \
                sum[i] += a[i / across * A.down] * side[i % across];                                        \
        }                                                                                                   \
        _Pragma("GCC unroll 12") for (int i = 0; i < rows; i++, c += c_down)                                \
            _Pragma("GCC unroll 2") for (int n = 0; n < across; n++)                                        \
            {                                                                                               \
                if (adds) sum[i * across + n] += *(const V *)(c + n * LANES);                               \
                *(V *)(c + n * LANES) = sum[i * across + n];                                                \
            }                                                                                               \
    }

BLOCK(wide_block, Wide)
BLOCK(block8, By8)
BLOCK(block4, By4)
BLOCK(block1, By1)

static inline __attribute__((always_inline)) void some_rows(
    const int rows, const int columns, Size inner, Matrix A, Matrix B, REAL *c, Size c_down, int adds)
{
    if (columns == 16) {
        wide_block(rows, 16 / WIDE, inner, A.start, A, B.start, B.down, c, c_down, adds);
        return;
    }
    int j = 0;
    for (; j + 8 <= columns; j += 8) block8(rows, 1, inner, A.start, A, B.start + j, B.down, c + j, c_down, adds);
    for (; j + 4 <= columns; j += 4) block4(rows, 1, inner, A.start, A, B.start + j, B.down, c + j, c_down, adds);
    for (; j < columns; j++) block1(rows, 1, inner, A.start, A, B.start + j, B.down, c + j, c_down, adds);
}

/* At most 16 columns; of rows `most` at once. Fewer take nearly as long, so where 6 at once would leave some, it is 5
 * until they leave none; and of 8 rows 4 and 4. */
static inline __attribute__((always_inline)) void strip(
    const int most, Size rows, const int columns, Size inner, Matrix A, Matrix B, REAL *c, Size c_down, int adds)
{
    for (; most == 6 && rows % 6 && rows >= 5 && rows != 8; rows -= 5, A.start += 5 * A.down, c += 5 * c_down)
        some_rows(5, columns, inner, A, B, c, c_down, adds);
    for (; rows >= most && (most != 6 || rows != 8); rows -= most, A.start += most * A.down, c += most * c_down)
        some_rows(most, columns, inner, A, B, c, c_down, adds);
    for (; rows >= 4; rows -= 4, A.start += 4 * A.down, c += 4 * c_down)
        some_rows(4, columns, inner, A, B, c, c_down, adds);
    for (; rows >= 2; rows -= 2, A.start += 2 * A.down, c += 2 * c_down)
        some_rows(2, columns, inner, A, B, c, c_down, adds);
    if (rows) some_rows(1, columns, inner, A, B, c, c_down, adds);
}

/* C = A B, or C += A B, for A of shape (rows, inner) and B of shape (inner, columns). */
static void product(Size rows, Size columns, Size inner, Matrix A, Matrix B, REAL *c, Size c_down, int adds)
{
    for (Size k = 0; k < inner || !k; k += DEEP, adds = 1) {
        const Size deep = inner - k < DEEP ? inner - k : DEEP;
        const Matrix a = {A.start + k * A.across, A.down, A.across};
        for (Size j = 0; j < columns; j += 16) {
            const Matrix b = {B.start + k * B.down + j, B.down, 1};
            if (columns - j >= 16)
                strip(ROWS, rows, 16, deep, a, b, c + j, c_down, adds);
            else if (columns - j == 8)
                strip(8, rows, 8, deep, a, b, c + j, c_down, adds);
            else
                strip(8, rows, (int)(columns - j), deep, a, b, c + j, c_down, adds);
        }
    }
}

#define MOVE(V) *(V *)to = *(const V *)values, values += sizeof(V) / sizeof(REAL), to += sizeof(V) / sizeof(REAL)

/* Pieces are short, and a call of memcpy, which compilers make of a plain loop, takes longer. */
static inline __attribute__((always_inline)) void copy(Size count, const REAL *values, REAL *to)
{
    for (Size left = count / 16; left; left--) MOVE(By8), MOVE(By8);
    if (count & 8) MOVE(By8);
    if (count & 4) MOVE(By4);
    for (Size left = count & 3; left; left--) MOVE(By1);
}

static inline __attribute__((always_inline)) void add(
    Size count, REAL weight, const REAL *restrict values, REAL *restrict to)
{
    Size j = 0;
    for (; j + WIDE <= count; j += WIDE) *(Wide *)(to + j) += weight * *(const Wide *)(values + j);
    for (; j + 4 <= count; j += 4) *(By4 *)(to + j) += weight * *(const By4 *)(values + j);
    for (; j < count; j++) to[j] += weight * values[j];
}

/* The same where nothing is yet. */
static inline __attribute__((always_inline)) void put(
    Size count, REAL weight, const REAL *restrict values, REAL *restrict to)
{
    Size j = 0;
    for (; j + WIDE <= count; j += WIDE) *(Wide *)(to + j) = weight * *(const Wide *)(values + j);
    for (; j + 4 <= count; j += 4) *(By4 *)(to + j) = weight * *(const By4 *)(values + j);
    for (; j < count; j++) to[j] = weight * values[j];
}

static inline REAL total(Wide v)
{
    REAL sum = 0;
    for (int lane = 0; lane < WIDE; lane++) sum += v[lane];
    return sum;
}

static inline REAL dot(Size count, const REAL *a, const REAL *b)
{
    Wide sums = {0};
    Size j = 0;
    for (; j + WIDE <= count; j += WIDE) sums += *(const Wide *)(a + j) * *(const Wide *)(b + j);
    REAL sum = total(sums);
    for (; j < count; j++) sum += a[j] * b[j];
    return sum;
}

#ifdef __clang__
#define MIXED(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
typedef __typeof__(_Generic((REAL)0, float: (int32_t)0, double: (int64_t)0)) Lane; /* As wide as a number. */
typedef Lane Lanes8 __attribute__((vector_size(8 * sizeof(Lane))));
#define MIXED(A, B, ...) __builtin_shuffle(A, B, (Lanes8){__VA_ARGS__})
#endif

/* 8 rows of 8 numbers each, turned. */
static inline __attribute__((always_inline)) void turn8(const REAL *from, Size down, REAL *to, Size to_down)
{
    By8 by1[8], by2[8];
    _Pragma("GCC unroll 4") for (int i = 0; i < 8; i += 2)
    {
        const By8 a = *(const By8 *)(from + i * down), b = *(const By8 *)(from + (i + 1) * down);
        by1[i] = MIXED(a, b, 0, 8, 1, 9, 4, 12, 5, 13), by1[i + 1] = MIXED(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
    {
        const By8 a = by1[i / 2 * 4 + i % 2], b = by1[i / 2 * 4 + i % 2 + 2];
        by2[i / 2 * 4 + i % 2 * 2] = MIXED(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
        by2[i / 2 * 4 + i % 2 * 2 + 1] = MIXED(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
    {
        *(By8 *)(to + i * to_down) = MIXED(by2[i], by2[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(By8 *)(to + (i + 4) * to_down) = MIXED(by2[i], by2[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* to[j * to_down + i] = from[i * down + j]. */
static void turn_over(Size rows, Size columns, const REAL *from, Size down, REAL *to, Size to_down)
{
    Size i = 0;
    for (; i + 8 <= rows; i += 8) {
        Size j = 0;
        for (; j + 8 <= columns; j += 8) turn8(from + i * down + j, down, to + j * to_down + i, to_down);
        for (; j < columns; j++)
            for (Size n = i; n < i + 8; n++) to[j * to_down + n] = from[n * down + j];
    }
    for (; i < rows; i++)
        for (Size j = 0; j < columns; j++) to[j * to_down + i] = from[i * down + j];
}
