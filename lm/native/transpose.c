/* target[j, i] = source[i, j] for elements of 2 or 4 bytes, by square tiles in registers.

NumPy copies a transpose element by element, at 1.6 GB/s of bfloat16.
*/
#include <stdint.h>
#include <string.h>

#define SIDE 16 /* of a tile that is turned in registers */

#ifdef __clang__
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif
#define INLINE static inline __attribute__((always_inline))

/* Four times, the rows of the upper half are interleaved with those of the lower one: row and
   column of an element are eight bits, which each time turn by one. */
#define TRANSPOSE(name, element)                                                              \
  typedef element name##_row __attribute__((vector_size(SIDE * sizeof(element))));            \
  INLINE void name##_tile(char *target, int64_t to, const char *source, int64_t from) {       \
    name##_row a[SIDE], b[SIDE];                                                              \
    for (int i = 0; i < SIDE; i++) memcpy(&a[i], source + i * from, sizeof(name##_row));      \
    for (int turn = 0; turn < 4; turn++) {                                                    \
      for (int i = 0; i < SIDE / 2; i++) {                                                    \
        b[2 * i] = SHUFFLE(name##_row, a[i], a[i + SIDE / 2], 0, 16, 1, 17, 2, 18, 3, 19, 4,  \
                           20, 5, 21, 6, 22, 7, 23);                                          \
        b[2 * i + 1] = SHUFFLE(name##_row, a[i], a[i + SIDE / 2], 8, 24, 9, 25, 10, 26, 11,   \
                               27, 12, 28, 13, 29, 14, 30, 15, 31);                           \
      }                                                                                       \
      for (int i = 0; i < SIDE; i++) a[i] = b[i];                                             \
    }                                                                                         \
    for (int i = 0; i < SIDE; i++) memcpy(target + i * to, &a[i], sizeof(name##_row));        \
  }                                                                                           \
  static void name(char *target, int64_t to, const char *source, int64_t from, int64_t rows,  \
                   int64_t columns) {                                                         \
    const int64_t size = sizeof(element);                                                     \
    const int64_t all = columns / SIDE * SIDE, whole = rows / SIDE * SIDE;                    \
    for (int64_t j = 0; j < all; j += SIDE)                                                   \
      for (int64_t i = 0; i < whole; i += SIDE)                                               \
        name##_tile(target + j * to + i * size, to, source + i * from + j * size, from);      \
    for (int64_t c = 0; c < columns; c++)                                                     \
      for (int64_t r = c < all ? whole : 0; r < rows; r++)                                    \
        memcpy(target + c * to + r * size, source + r * from + c * size, size);               \
  }

TRANSPOSE(halves, uint16_t)
TRANSPOSE(wholes, uint32_t)

/* `to`, `from`: bytes from row to row; rows and columns are those of the source. */
void aniso_transpose(char *target, int64_t to, const char *source, int64_t from, int64_t rows,
                     int64_t columns, int64_t size) {
  (size == 2 ? halves : wholes)(target, to, source, from, rows, columns);
}
