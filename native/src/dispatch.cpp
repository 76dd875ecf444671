// Chooses, once, the best level of kernels that both this build and this processor have.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(HEADRACE_BUILD_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace headrace {

namespace portable {
extern const KernelTable table;
}
#if defined(HEADRACE_BUILD_AVX2)
namespace avx2 {
extern const KernelTable table;
}
#endif
#if defined(HEADRACE_BUILD_AVX512)
namespace avx512 {
extern const KernelTable table;
}
#endif
#if defined(HEADRACE_BUILD_AMX)
namespace amx {
extern const KernelTable table;
}
#endif

namespace {

#if defined(HEADRACE_BUILD_AVX2)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
#endif

#if defined(HEADRACE_BUILD_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
#endif

#if defined(HEADRACE_BUILD_AMX)
// The processor has tiles, and Linux grants them to a process that asks (Documentation/arch/x86/xstate.rst).
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d >> 24 & 1) != 0, bf16 = (d >> 22 & 1) != 0, int8 = (d >> 25 & 1) != 0;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return tiles && bf16 && int8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const KernelTable& choose() {
  const char* forced = std::getenv("HEADRACE_NATIVE_ISA");
  if (forced && !*forced) forced = nullptr;
  std::string known;
  const KernelTable* chosen = nullptr;
  // From worst to best: the last that fits wins.
  const auto offer = [&](const KernelTable& table, bool supported) {
    if (!supported) return;
    known += (known.empty() ? "" : ", ") + std::string(table.level);
    if (!forced || std::strcmp(forced, table.level) == 0) chosen = &table;
  };
  offer(portable::table, true);
#if defined(HEADRACE_BUILD_AVX2)
  offer(avx2::table, has_avx2());
#endif
#if defined(HEADRACE_BUILD_AVX512)
  offer(avx512::table, has_avx512());
#endif
#if defined(HEADRACE_BUILD_AMX)
  offer(amx::table, has_amx());
#endif
  if (!chosen)
    throw std::runtime_error("HEADRACE_NATIVE_ISA=" + std::string(forced) + " is not one of this machine's levels (" +
                             known + "); unset it to take the best");
  return *chosen;
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace headrace
