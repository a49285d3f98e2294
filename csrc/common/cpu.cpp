#include "cpu.h"

#include <stdexcept>
#include <string>

namespace fastconv {
CpuCapability best_cpu_capability() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return CpuCapability::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return CpuCapability::avx2;
#endif
  return CpuCapability::portable;
}

namespace {

CpuCapability chosen_capability() {
  const CpuCapability best = best_cpu_capability();
  const char* name = std::getenv("FASTCONV_CPU_CAPABILITY");
  if (name == nullptr || *name == '\0') return best;
  for (int i = 0; i <= int(best); ++i)
    if (name == std::string(cpu_capability_name(CpuCapability(i)))) return CpuCapability(i);
  throw std::runtime_error(
      std::string("FASTCONV_CPU_CAPABILITY must be portable, avx2 or avx512, and this processor's best is ") +
      cpu_capability_name(best) + "; got " + name);
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = chosen_capability();
  return capability;
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has && cpu_capability() == CpuCapability::avx512;
#else
  return false;
#endif
}

const char* cpu_capability_name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::avx512:
      return "avx512";
    case CpuCapability::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace fastconv
