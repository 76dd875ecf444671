// Reads memory once and does nothing with it but add: the limit that decode is measured against.
#include "kernels.h"
#include "parallel.h"

namespace headrace::HEADRACE_LEVEL {

uint64_t read(const ReadArgs& args) {
  constexpr int64_t kLine = 64, kAtOnce = 4;
  uint64_t total = 0;
  in_row_ranges(args.bytes / (kLine * kAtOnce), 1024, [&](int64_t first, int64_t end) {
    Int16 sum[kAtOnce];
    for (auto& part : sum) part = broadcast(int32_t{0});
    for (int64_t i = first; i < end; ++i)
      for (int64_t part = 0; part < kAtOnce; ++part)
        sum[part] = sum[part] + load_words(static_cast<const char*>(args.memory) + (i * kAtOnce + part) * kLine);
    const Int16 all = sum[0] + sum[1] + sum[2] + sum[3];
    uint32_t lane[kLanes];
    std::memcpy(lane, &all, sizeof lane);
    uint64_t own = 0;
    for (uint32_t word : lane) own += word;
    __atomic_add_fetch(&total, own, __ATOMIC_RELAXED);
  });
  return total;
}

}  // namespace headrace::HEADRACE_LEVEL
