/* Products of few rows (rows.c) as XLA's foreign functions: threads of XLA's pool take tiles.

  aniso_rows     x [..., R, D], w [..., D, F] -> y [..., R, F]
  aniso_rows_t   x [..., R, D], w [..., F, D] -> y [..., R, F]   (as a tied embedding lies)

x and w are both float32 or both bfloat16, y is either; R is 1 to MOST, and the leading axes are the
same. Anything else is an error. `lm.native` builds and registers them.
*/
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "rows.h"
#include "xla/ffi/api/c_api.h"

typedef struct {
  atomic_long next, done, users;
  long tiles;
  Product first; /* of several, of which each has its tiles */
  int64_t tile, tiles_each, x_each, w_each, y_each;
  Tile *work;
  uint32_t x[];
} Job;

static void work(Job *job) {
  for (long i; (i = atomic_fetch_add(&job->next, 1)) < job->tiles;) {
    const int64_t number = i / job->tiles_each, first = i % job->tiles_each * job->tile;
    Product product = job->first;
    product.x += number * job->x_each;
    product.w += number * job->w_each;
    product.y += number * job->y_each;
    const int64_t left = product.columns - first;
    job->work(&product, first, left < job->tile ? left : job->tile);
    atomic_fetch_add(&job->done, 1);
  }
}

static void leave(Job *job) {
  if (atomic_fetch_sub(&job->users, 1) == 1) free(job);
}

static void help(void *job) {
  work(job);
  leave(job);
}

static XLA_FFI_Error *fail(const XLA_FFI_Api *api, const char *message) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message,
                                    XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return api->XLA_FFI_Error_Create(&args);
}

static int forgive(const XLA_FFI_Api *api, XLA_FFI_Error *error) {
  if (!error) return 0;
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  api->XLA_FFI_Error_Destroy(&args);
  return 1;
}

static int known(XLA_FFI_DataType type) {
  return type == XLA_FFI_DataType_F32 || type == XLA_FFI_DataType_BF16;
}

static XLA_FFI_Error *run(XLA_FFI_CallFrame *frame, const int transposed) {
  const XLA_FFI_Api *api = frame->api;
  XLA_FFI_InternalExtension *extension = frame->extension_start;
  if (extension && extension->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    return NULL;
  }
  if (frame->args.size != 2 || frame->rets.size != 1) return fail(api, "expected x, w and y");
  const XLA_FFI_Buffer *x = frame->args.args[0], *w = frame->args.args[1];
  const XLA_FFI_Buffer *y = frame->rets.rets[0];
  const int64_t rank = x->rank;
  if (rank < 2 || w->rank != rank || y->rank != rank) return fail(api, "expected matrices");
  const int64_t *xd = x->dims + rank - 2, *wd = w->dims + rank - 2, *yd = y->dims + rank - 2;
  const int64_t rows = xd[0], depth = xd[1], columns = yd[1];
  int64_t products = 1;
  for (int i = 0; i < rank - 2; i++) {
    if (w->dims[i] != x->dims[i] || y->dims[i] != x->dims[i])
      return fail(api, "the leading axes differ");
    products *= x->dims[i];
  }
  if (rows < 1 || rows > MOST || yd[0] != rows || wd[transposed] != depth ||
      wd[!transposed] != columns || columns < 1 || products < 1)
    return fail(api, "the shapes do not fit");
  if (x->dtype != w->dtype || !known(x->dtype) || !known(y->dtype))
    return fail(api, "expected x and w of float32 or of bfloat16");

  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args count = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL,
                                              frame->ctx, &threads};
  if (forgive(api, api->XLA_FFI_ThreadPool_NumThreads(&count)) || threads < 1) threads = 1;
  const int wide = x->dtype == XLA_FFI_DataType_F32, wide_out = y->dtype == XLA_FFI_DataType_F32;
  Product first = {rows, depth, columns, group_of(rows), wide_out, NULL, w->data, y->data};
  const int64_t words = arranged_words(&first);
  Job *job = calloc(1, sizeof(Job) + products * words * sizeof(uint32_t));
  if (!job) return fail(api, "out of memory");
  first.x = job->x;
  job->first = first;
  job->work = tile_function(wide, transposed);
  job->x_each = words;
  job->w_each = depth * columns * (wide ? 4 : 2);
  job->y_each = rows * columns * (wide_out ? 4 : 2);
  for (int64_t i = 0; i < products; i++)
    arrange_rows(&first, job->x + i * words,
                 (const char *)x->data + i * rows * depth * (wide ? 4 : 2), wide, transposed);
  /* As many tiles for each thread, and each as wide. */
  const int64_t sharing = products < threads ? threads : 1;
  const int64_t rounds = (columns + sharing * TILE - 1) / (sharing * TILE);
  job->tile = (columns + rounds * sharing - 1) / (rounds * sharing);
  job->tile = (job->tile + PAIR - 1) / PAIR * PAIR;
  job->tiles_each = (columns + job->tile - 1) / job->tile;
  job->tiles = (long)(products * job->tiles_each);

  atomic_store(&job->users, 1);
  for (int i = 1; i < threads && i < job->tiles; i++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL,
                                             frame->ctx, help, job};
    atomic_fetch_add(&job->users, 1);
    if (forgive(api, api->XLA_FFI_ThreadPool_Schedule(&args))) {
      atomic_fetch_sub(&job->users, 1); /* fewer hands */
      break;
    }
  }
  work(job);
  /* Tiles that others have begun. Whoever comes later finds none left, so nobody waits for it. */
  for (int spins = 0; atomic_load(&job->done) < job->tiles;)
    if (++spins > 4096) sched_yield();
  leave(job);
  return NULL;
}

XLA_FFI_Error *aniso_rows(XLA_FFI_CallFrame *frame) { return run(frame, 0); }
XLA_FFI_Error *aniso_rows_t(XLA_FFI_CallFrame *frame) { return run(frame, 1); }
