// RMS norm: one row at a time, sums in a fixed order within the row.
#include "kernels.h"
#include "parallel.h"

namespace headrace::HEADRACE_LEVEL {
namespace {

// Elements below which a region costs more than it saves.
constexpr int64_t kGrain = 8192;

}  // namespace

void norm(const NormArgs& args) {
  in_row_ranges(args.rows, kGrain / (args.columns + 1) + 1, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const float* x = args.x + row * args.columns;
      Float16 squares = broadcast(0.0f);
      over_row(args.columns, [&](int64_t i, int64_t n) {
        const Float16 v = load_lanes(x + i, n);
        squares = fma(v, v, squares);
      });
      const float mean = horizontal_sum(squares) / static_cast<float>(args.columns);
      const Float16 scale = broadcast(1.0f / __builtin_sqrtf(mean + args.eps));
      over_row(args.columns, [&](int64_t i, int64_t n) {
        const Float16 v = load_lanes(x + i, n) * scale * load_lanes(args.weight + i, n);
        const int64_t at = row * args.columns + i;
        if (args.output == Output::bf16) {
          store_lanes(static_cast<bf16*>(args.y) + at, v, n);
        } else {
          float* y = static_cast<float*>(args.y) + at;
          store_lanes(y, args.output == Output::add ? load_lanes(y, n) + v : v, n);
        }
      });
    }
  });
}

}  // namespace headrace::HEADRACE_LEVEL
