// Counter-based Gumbel noise for a list of tokens.
#include "gumbel.h"
#include "kernels.h"
#include "parallel.h"

namespace headrace::HEADRACE_LEVEL {
namespace {

constexpr int64_t kGrain = 4096;

}  // namespace

void uniform(const GumbelArgs& args) {
  in_row_ranges(args.count, kGrain, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) args.out[i] = uniform_of(args.stream, args.tokens[i]);
  });
}

void gumbel(const GumbelArgs& args) {
  in_row_ranges(args.count, kGrain, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i)
      args.out[i] = -log_of(-log_of(uniform_of(args.stream, args.tokens[i])));
  });
}

}  // namespace headrace::HEADRACE_LEVEL
