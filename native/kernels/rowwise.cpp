// What is done to rows one at a time: RMS norm, with sums in a fixed order within the row; embedding; soft cap.
#include "functions.h"
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

namespace {

template <class T>
void embed_rows(const EmbedArgs& args, int64_t first, int64_t end) {
  const Float16 scale = broadcast(args.scale);
  for (int64_t row = first; row < end; ++row) {
    const T* from = static_cast<const T*>(args.table) + args.tokens[row] * args.columns;
    float* to = args.y + row * args.columns;
    over_row(args.columns, [&](int64_t i, int64_t n) { store_lanes(to + i, load_lanes(from + i, n) * scale, n); });
  }
}

}  // namespace

void embed(const EmbedArgs& args) {
  in_row_ranges(args.count, kGrain / (args.columns + 1) + 1, [&](int64_t first, int64_t end) {
    if (args.type == Type::bf16)
      embed_rows<bf16>(args, first, end);
    else
      embed_rows<float>(args, first, end);
  });
}

void cap(const CapArgs& args) {
  const Float16 cap = broadcast(args.cap);
  in_row_ranges(args.rows * args.columns / kLanes + 1, kGrain / kLanes, [&](int64_t first, int64_t end) {
    const int64_t last = args.rows * args.columns;
    for (int64_t at = first * kLanes; at < end * kLanes && at < last; at += kLanes) {
      const int64_t n = last - at < kLanes ? last - at : kLanes;
      store_lanes(args.x + at, cap * tanh(load_lanes(args.x + at, n) / cap), n);
    }
  });
}

}  // namespace headrace::HEADRACE_LEVEL
