/* y = x w for a few rows of x, on CPUs: reads the weights once, in the layout that they have.

XLA:CPU's products of a few rows read weights at a third to a half of the speed of memory. Here
tiles of columns of the result keep their sums in the first cache, and rows of weights are fetched
ahead of their use. Products are summed in float32, in an order that depends on the shapes
alone; a bfloat16 result is rounded to nearest even, once.

x and w are both float32 or both bfloat16, y is either. products.c cuts the work into tiles.
*/
#include "rows.h"

#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(2)));

#define STRIDE (TILE + PAIR) /* of sums: at a power of two all rows share cache lines */
#define INLINE static inline __attribute__((always_inline))

INLINE float read_one(const char *at, const int wide) {
  uint32_t word = 0;
  if (wide) memcpy(&word, at, 4);
  else memcpy((char *)&word + 2, at, 2); /* little endian */
  float value;
  memcpy(&value, &word, 4);
  return value;
}

INLINE uint16_t half(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  if ((word & 0x7fffffff) > 0x7f800000) return (uint16_t)(word >> 16 | 0x40); /* NaN */
  return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

static void write_one(const Product *job, int64_t row, int64_t column, float value) {
  int64_t index = row * job->columns + column;
  if (job->wide_out) ((float *)job->y)[index] = value;
  else ((uint16_t *)job->y)[index] = half(value);
}

/* Units of depth: two rows of w where the processor multiplies pairs of bfloat16. */
#ifdef __AVX512BF16__
#define UNIT(wide) ((wide) ? 1 : 2)
INLINE vector multiply(vector sum, words x, words w) {
  return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
}
#else
#define UNIT(wide) 1
#endif

/* sum += x v, of one unit: a float32, or a pair of bfloat16 (the first in the lower half). */
INLINE vector fused(vector sum, uint32_t x, words v, const int unit) {
#ifdef __AVX512BF16__
  if (unit == 2) return multiply(sum, x - (words){0}, v);
#else
  (void)unit;
#endif
  float value;
  memcpy(&value, &x, 4);
  return sum + value * (vector)v;
}

/* PAIR columns of a unit of w; bfloat16 comes out as the even columns and then the odd ones. */
INLINE void read_pair(const char *at, int64_t stride, const int wide, const int last, words *v) {
  if (wide) {
    v[0] = *(const words *)at;
    v[1] = *(const words *)(at + sizeof(words));
    return;
  }
  words a = *(const words *)at;
  if (UNIT(wide) == 1) {
    v[0] = a << 16;
    v[1] = a & 0xffff0000u;
  } else {
    words b = last ? (words){0} : *(const words *)(at + stride);
    v[0] = (a & 0xffffu) | b << 16;
    v[1] = a >> 16 | (b & 0xffff0000u);
  }
}

/* Adds units of rows of w, scaled by x [units, rows], to the sums of `rows` rows of x. */
INLINE void add(float *restrict sums, const uint32_t *restrict x, const char *restrict w,
                int64_t stride, int64_t columns, const int rows, const int units, const int wide,
                const int last, const int ahead) {
  const int unit = UNIT(wide), size = wide ? 4 : 2;
  for (int64_t n = 0; n < columns; n += PAIR) {
    vector s[GROUP][2];
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < 2; i++) s[r][i] = *(vector *)(sums + r * STRIDE + n + i * LANES);
    const char *at = w + n * size;
    const uint32_t *factor = x;
#pragma GCC unroll 1
    for (int u = 0; u < units; u++, at += unit * stride, factor += rows) {
      if (ahead)
        for (int i = 0; i < unit; i++) {
          const char *later = at + (units * unit + i) * stride;
          __builtin_prefetch(later, 0, 2);
          if (wide) __builtin_prefetch(later + 4 * LANES, 0, 2);
        }
      words v[2];
      read_pair(at, stride, wide, last, v);
      for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++) s[r][i] = fused(s[r][i], factor[r], v[i], unit);
    }
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < 2; i++) *(vector *)(sums + r * STRIDE + n + i * LANES) = s[r][i];
  }
}

/* Columns first, ..., of which there are fewer than PAIR. */
static void add_rest(const Product *job, int64_t first, const int wide) {
  const int unit = UNIT(wide), size = wide ? 4 : 2;
  const int64_t units = (job->depth + unit - 1) / unit;
  for (int64_t n = first; n < job->columns; n++)
    for (int64_t r = 0; r < job->rows; r++) {
      float sum = 0;
      for (int64_t d = 0; d < job->depth; d++) {
        const int group = job->group;
        const uint32_t *x = job->x + ((r / group) * units + d / unit) * group + r % group;
        const char *bits = (const char *)x + (unit == 2 ? 2 * (d % 2) : 0);
        sum += read_one(bits, unit == 1) * read_one(job->w + (d * job->columns + n) * size, wide);
      }
      write_one(job, r, n, sum);
    }
}

INLINE void tile(const Product *job, int64_t first, int64_t columns, const int group,
                 const int wide) {
  const int unit = UNIT(wide), size = wide ? 4 : 2, deep = DEEP / unit;
  const int64_t stride = job->columns * size, units = (job->depth + unit - 1) / unit;
  const int64_t full = job->depth / unit, whole = columns / PAIR * PAIR;
  vector memory[MOST * STRIDE / LANES] __attribute__((aligned(64)));
  float *sums = (float *)memory;
  const char *w = job->w + first * size;
  for (int r = 0; r < (job->rows + group - 1) / group * group; r++)
    memset(sums + r * STRIDE, 0, whole * sizeof(float));
#define ADD(count, last, ahead)                                                              \
  for (int r = 0; r < job->rows; r += group)                                                 \
    add(sums + r * STRIDE, job->x + r * units + u * group, w + u * unit * stride, stride, whole, \
        group, count, wide, last, (ahead) && r == 0)
  int64_t u = 0;
  for (; u + 2 * deep <= full; u += deep) ADD(deep, 0, 1);
  for (; u + deep <= full; u += deep) ADD(deep, 0, 0);
  for (; u < full; u++) ADD(1, 0, 0);
  for (; u < units; u++) ADD(1, 1, 0);
#undef ADD
  for (int64_t r = 0; r < job->rows; r++)
    for (int64_t n = 0; n < whole; n++) {
      int64_t in = n % PAIR, from = wide ? in : in % 2 * LANES + in / 2;
      write_one(job, r, first + n, sums[r * STRIDE + n - in + from]);
    }
  if (whole < columns) add_rest(job, first + whole, wide);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif
/* Of n vectors n / 2: sums of the halves of runs of lanes that belong to one of the first ones. */
#define FOLD(n, low, high)             \
  for (int i = 0; i < (n) / 2; i++) {  \
    vector a = s[2 * i], b = s[2 * i + 1]; \
    s[i] = SHUFFLE(a, b, low) + SHUFFLE(a, b, high); \
  }
#define LIST(...) __VA_ARGS__

/* The sums of the lanes of s[0], s[1], ..., in this order. */
INLINE vector totals(vector *s) {
#if LANES == 16
  FOLD(16, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
       LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  FOLD(8, LIST(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
       LIST(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
  FOLD(4, LIST(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29),
       LIST(2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
  FOLD(2, LIST(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
       LIST(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
#else
  FOLD(8, LIST(0, 1, 2, 3, 8, 9, 10, 11), LIST(4, 5, 6, 7, 12, 13, 14, 15))
  FOLD(4, LIST(0, 1, 4, 5, 8, 9, 12, 13), LIST(2, 3, 6, 7, 10, 11, 14, 15))
  FOLD(2, LIST(0, 2, 4, 6, 8, 10, 12, 14), LIST(1, 3, 5, 7, 9, 11, 13, 15))
#endif
  return s[0];
}

/* The transposed product: x is [rows, depth] of w's type where pairs are multiplied, else float32
   with PAIR columns at a time in the order of `read_pair`. LANES sums are made side by side. */
INLINE void tile_t(const Product *job, int64_t first, int64_t columns, const int group,
                   const int wide) {
  const int unit = UNIT(wide), size = wide ? 4 : 2, side = LANES / group;
  const int64_t depth = job->depth, whole = depth / PAIR * PAIR, row = depth * size;
  const int64_t stride = (depth + PAIR - 1) / PAIR * PAIR / unit; /* of x, in words */
  for (int64_t f = first; f < first + columns; f += side) {
    const char *w = job->w + f * row;
    const int count = first + columns - f < side ? (int)(first + columns - f) : side;
    const int64_t ahead = f + 2 * side <= job->columns ? side * row : 0;
    for (int base = 0; base < job->rows; base += group) {
      const uint32_t *x = job->x + base * stride;
      vector s[LANES] = {0};
#pragma GCC unroll 1
      for (int64_t d = 0; d < whole; d += PAIR) {
        words factors[GROUP][2];
        for (int r = 0; r < group; r++)
          for (int j = 0; j < 2 / unit; j++)
            factors[r][j] = *(const words *)(x + r * stride + d / unit + j * LANES);
        for (int i = 0; i < side; i++) {
          const char *at = w + (i < count ? i : 0) * row + d * size;
          if (base == 0) __builtin_prefetch(at + ahead, 0, 2);
          if (base == 0 && wide) __builtin_prefetch(at + ahead + 4 * LANES, 0, 2);
          words v[2];
          if (unit == 2) v[0] = *(const words *)at;
          else read_pair(at, 0, wide, 0, v);
          for (int r = 0; r < group; r++)
            for (int j = 0; j < 2 / unit; j++) {
              vector *sum = s + i * group + r;
#ifdef __AVX512BF16__
              if (unit == 2) *sum = multiply(*sum, factors[r][j], v[j]);
              else
#endif
                *sum += (vector)factors[r][j] * (vector)v[j];
            }
        }
      }
      vector sums = totals(s);
      for (int i = 0; i < count; i++)
        for (int r = 0; r < group && base + r < job->rows; r++) {
          float sum = sums[i * group + r];
          const char *bits = (const char *)(x + r * stride);
          for (int64_t d = whole; d < depth; d++) {
            int64_t in = d % PAIR, from = wide ? d : d - in + in % 2 * LANES + in / 2;
            float factor = unit == 2 ? read_one(bits + 2 * d, 0) : read_one(bits + 4 * from, 1);
            sum += factor * read_one(w + i * row + d * size, wide);
          }
          write_one(job, base + r, f + i, sum);
        }
    }
  }
}

#define CHOOSE(name, function, wide)                                       \
  static void name(const Product *job, int64_t first, int64_t columns) {   \
    switch (job->group) {                                                  \
      case 1: function(job, first, columns, 1, wide); break;               \
      case 2: function(job, first, columns, 2, wide); break;               \
      case 4: function(job, first, columns, 4, wide); break;               \
      default: function(job, first, columns, GROUP, wide);                 \
    }                                                                      \
  }
CHOOSE(rows_wide, tile, 1)
CHOOSE(rows_half, tile, 0)
CHOOSE(rows_t_wide, tile_t, 1)
CHOOSE(rows_t_half, tile_t, 0)

/* x to where the tiles look for it, between zeros. */
void arrange_rows(const Product *job, uint32_t *to, const char *x, int wide, int transposed) {
  const int unit = UNIT(wide), size = wide ? 4 : 2, group = job->group;
  const int64_t units = (job->depth + unit - 1) / unit;
  const int64_t stride = (job->depth + PAIR - 1) / PAIR * PAIR / unit;
  for (int64_t r = 0; r < job->rows; r++)
    for (int64_t d = 0; d < job->depth; d++) {
      const char *from = x + (r * job->depth + d) * size;
      int64_t in = d % PAIR, mixed = wide ? in : in % 2 * LANES + in / 2;
      int64_t at = ((r / group) * units + d / unit) * group + r % group;
      if (transposed) at = r * stride + (unit == 2 ? d / 2 : d - in + mixed);
      if (unit == 2) {
        memcpy((char *)(to + at) + 2 * (d % 2), from, 2);
      } else {
        float value = read_one(from, wide);
        memcpy(to + at, &value, 4);
      }
    }
}

int64_t arranged_words(const Product *job) {
  const int64_t padded = (job->depth + PAIR - 1) / PAIR * PAIR;
  return (job->rows + job->group - 1) / job->group * job->group * padded;
}

Tile *tile_function(int wide, int transposed) {
  if (transposed) return wide ? rows_t_wide : rows_t_half;
  return wide ? rows_wide : rows_half;
}
