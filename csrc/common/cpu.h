// What a C++ kernel file needs: its instruction set, and threads.
//
// Each *_cpu.cpp is compiled once per instruction set, with FASTCONV_CPU_CAPABILITY naming the
// namespace its kernels live in; the binding calls the best one that this processor has.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__x86_64__)
#define FASTCONV_DECLARE_CPU(...) \
  namespace portable {            \
  __VA_ARGS__                     \
  }                               \
  namespace avx2 {                \
  __VA_ARGS__                     \
  }                               \
  namespace avx512 {              \
  __VA_ARGS__                     \
  }
#define FASTCONV_CALL_CPU(...)              \
  switch (::fastconv::cpu_capability()) {   \
    case ::fastconv::CpuCapability::avx512: \
      ::fastconv::avx512::__VA_ARGS__;      \
      break;                                \
    case ::fastconv::CpuCapability::avx2:   \
      ::fastconv::avx2::__VA_ARGS__;        \
      break;                                \
    default:                                \
      ::fastconv::portable::__VA_ARGS__;    \
  }
#else
#define FASTCONV_DECLARE_CPU(...) \
  namespace portable {            \
  __VA_ARGS__                     \
  }
#define FASTCONV_CALL_CPU(...) ::fastconv::portable::__VA_ARGS__
#endif

namespace fastconv {

// portable: the compiler's baseline (SSE2 on x86-64, NEON on AArch64).
enum class CpuCapability { portable, avx2, avx512 };

CpuCapability best_cpu_capability();  // of this processor

// The best instruction set of this processor, or the one that the environment variable
// FASTCONV_CPU_CAPABILITY names; read once.
CpuCapability cpu_capability();
bool multiplies_bfloat16();  // has VDPBF16PS beside AVX-512, and may use it
const char* cpu_capability_name(CpuCapability capability);

// Calls body(begin, end, context) on parts of [0, count) from several threads. The caller brings the
// threads (PyTorch's pool in the library), so kernels need no thread library of their own.
using ParallelFor = void (*)(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);

template <typename Body>  // Body: void(int64_t begin, int64_t end)
inline void parallel_for(ParallelFor threads, int64_t count, const Body& body) {
  threads(
      count,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// body(std::integral_constant<int, value>), of a value in [First, Last].
template <int First, int Last, typename Body>
inline void with_constant(int64_t value, const Body& body) {
  if constexpr (First < Last)
    if (value != First) return with_constant<First + 1, Last>(value, body);
  body(std::integral_constant<int, First>{});
}

// A scratch array on a cache line's boundary, not initialised.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64))) {
    if (data_ == nullptr)
      throw std::runtime_error("out of memory: no " + std::to_string(count * sizeof(T)) +
                               " bytes for a kernel's scratch buffer");
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace fastconv
