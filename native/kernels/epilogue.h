// What becomes of a row of sums: bias, activation, rounding, and storing or adding. The same for every kind of weight.
#pragma once

#include "functions.h"
#include "kernels.h"

namespace headrace::HEADRACE_LEVEL {

HEADRACE_INLINE Float16 rounded(Float16 v, Type type) {
  if (type != Type::bf16) return v;
  bf16 lane[kLanes];
  store(lane, v);
  return load(lane);
}

// Gate and up are rounded as if they had been stored, so that fusing changes no bit.
HEADRACE_INLINE void finish_gated(const LinearArgs& args, int64_t row, int64_t panel, Float16 gate, Float16 up) {
  const int64_t column = panel * kGatedPanel;
  const int64_t left = args.out / 2 - column;
  gate = rounded(gate, args.type);
  up = rounded(up, args.type);
  const Float16 v = (args.gate == Gate::silu ? silu(gate) : gelu_tanh(gate)) * up;
  const int64_t n = left < kLanes ? left : kLanes;
  const int64_t at = row * args.y_stride + column;
  if (args.output == Output::bf16)
    store_lanes(static_cast<bf16*>(args.y) + at, v, n);
  else
    store_lanes(static_cast<float*>(args.y) + at, v, n);
}

// One row of a panel's sums, at most to the last column.
HEADRACE_INLINE void finish_row(const LinearArgs& args, int64_t row, int64_t panel, Float16 first, Float16 second) {
  const int64_t column = panel * kPanel;
  if (args.bias) {
    first = first + load(args.bias + column);
    second = second + load(args.bias + column + kLanes);
  }
  if (args.gate != Gate::none) {
    finish_gated(args, row, panel, first, second);
    return;
  }
  const int64_t at = row * args.y_stride + column;
  const int64_t left = args.out - column;
  if (args.output == Output::bf16) {
    bf16* y = static_cast<bf16*>(args.y) + at;
    if (left >= kPanel) {
      store_pair(y, first, second);
    } else {
      store_some(y, first, left < kLanes ? left : kLanes);
      if (left > kLanes) store_some(y + kLanes, second, left - kLanes);
    }
    return;
  }
  float* y = static_cast<float*>(args.y) + at;
  const bool add = args.output == Output::add;
  if (left >= kPanel) {
    store(y, add ? load(y) + first : first);
    store(y + kLanes, add ? load(y + kLanes) + second : second);
  } else {
    const int64_t n = left < kLanes ? left : kLanes;
    store_some(y, add ? load_some(y, n) + first : first, n);
    if (left > kLanes) {
      const int64_t m = left - kLanes;
      store_some(y + kLanes, add ? load_some(y + kLanes, m) + second : second, m);
    }
  }
}

}  // namespace headrace::HEADRACE_LEVEL
