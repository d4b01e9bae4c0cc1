/* One product of a few rows, in tiles; see rows.c. */
#include <stdint.h>

#ifdef __AVX512F__
#define LANES 16 /* of a vector */
#define GROUP 8  /* rows of x whose sums are in registers together */
#else
#define LANES 8
#define GROUP 4
#endif
#define PAIR (2 * LANES) /* columns whose sums are in registers together */
#define DEEP 16          /* rows of w that are added up before sums leave the registers */
#define TILE 512         /* most columns of a tile */
#define MOST 32          /* rows of x; `lm.native.MOST_ROWS` */

typedef struct {
  int64_t rows, depth, columns;
  int group, wide_out;
  const uint32_t *x; /* in the order in which it is used */
  const char *w;
  char *y;
} Product;

/* Rows of x that are padded to together, for so many. */
static inline int group_of(int64_t rows) { return rows > 4 ? GROUP : rows > 2 ? 4 : (int)rows; }

/* Words of `x` as `arrange_rows` fills it; the memory must be zero before. */
int64_t arranged_words(const Product *product);
void arrange_rows(const Product *product, uint32_t *to, const char *x, int wide, int transposed);

typedef void Tile(const Product *product, int64_t first, int64_t columns);
/* The function that fills columns first, ... of y; x and w are float32 if `wide`. */
Tile *tile_function(int wide, int transposed);
