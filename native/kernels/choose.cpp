// Choosing a token for each of many rows of logits: the largest, or the largest after Gumbel noise.
//
// Every operation rounds once and is taken lane by lane, so all levels choose the same token.
#include "gumbel.h"
#include "kernels.h"
#include "parallel.h"

namespace headrace::HEADRACE_LEVEL {
namespace {

// With 53-bit uniforms a Gumbel variate lies in (-3.7, 36.8): what is further than this below the best scaled logit
// can never win.
constexpr float kReach = 41.0f;

// The first index of the largest value; -1 where that is infinite or something is not a number.
int64_t largest(const float* row, int64_t count, float& value) {
  Float16 best = broadcast(-__builtin_inff());
  Int16 odd = broadcast(int32_t{0});
  over_row(count, [&](int64_t i, int64_t n) {
    Float16 v = load_lanes(row + i, n);
    if (n < kLanes) v = select(lane_indices() < broadcast(static_cast<int32_t>(n)), v, best);
    const Int16 magnitude = bits(v) & broadcast(int32_t{0x7fffffff});
    odd = odd | (broadcast(int32_t{0x7f800000}) < magnitude);
    best = max(v, best);
  });
  int32_t lane[kLanes];
  std::memcpy(lane, &odd, sizeof lane);
  for (int i = 0; i < kLanes; ++i)
    if (lane[i]) return -1;
  value = horizontal_max(best);
  if (!(value - value == 0.0f)) return -1;
  int64_t at = 0;
  while (row[at] != value) ++at;
  return at;
}

// The token whose scaled logit plus noise is largest. A candidate far below the best needs a uniform variate so near
// to 1 that most are dismissed before a logarithm is taken: its noise is at most -log(1 - u), and it must reach what
// the leader has.
int64_t draw(const ChooseArgs& args, const ChooseRow& row, float best) {
  double leading = -__builtin_inf();
  int64_t winner = 0;
  for (int64_t token = 0; token < args.columns; ++token) {
    const float scaled = (row.logits[token] - best) / row.temperature;
    if (!(scaled > -kReach)) continue;
    const double z = static_cast<double>(scaled);
    const double u = uniform_of(row.stream, static_cast<uint32_t>(token));
    // -log(u) >= 1 - u, so the noise is at most -log(1 - u); with 1 - u >= 2^-k that is at most k ln 2.
    const double rest = 1.0 - u;
    uint64_t word;
    std::memcpy(&word, &rest, 8);
    const int64_t halvings = 1023 - static_cast<int64_t>(word >> 52);
    if (z + static_cast<double>(halvings) * 0.6931471805599454 < leading - 1e-9) continue;
    const double sum = z + -log_of(-log_of(u));
    if (sum > leading) {
      leading = sum;
      winner = token;
    }
  }
  return winner;
}

}  // namespace

void choose(const ChooseArgs& args) {
  auto one = [&](int64_t index) {
    const ChooseRow& row = args.rows[index];
    float best = 0.0f;
    int64_t token = largest(row.logits, args.columns, best);
    if (token >= 0 && row.temperature > 0.0f) token = draw(args, row, best);
    args.tokens[index] = token;
  };
  in_parallel(args.count, one);
}

}  // namespace headrace::HEADRACE_LEVEL
