// CUDA's language on the CPU: a .cu file that includes common/cuda.h compiles as C++ and runs here.
//
// A launch runs its blocks one after another on the calling thread, one launch at a time. The threads of a
// block are fibers, started in the order of their index; each runs until it ends or has to wait, so a kernel
// that never synchronises costs no switch at all. The rules, stricter than a GPU's where it hangs or guesses:
//   - __syncthreads(): every thread of the block must come to the same call. A thread that has returned, or
//     that waits at another one, is an error.
//   - warp functions (__syncwarp, __shfl_*, __ballot_, __any_, __all_sync): every thread of the mask that has
//     not returned must come to the same call with the same mask; a shuffle must read a lane that takes part.
//   - an exchange of registers or rows (mma, ldmatrix: common/cuda.h): every lane of the warp must come to
//   it.
//   - an asynchronous copy to shared memory arrives when its thread waits for it, and not before.
//   - shared memory holds NaN (all bits set) when a block starts, where it is dynamic; it is as large as
//   asked
//     for and no larger, so an address sanitizer sees every step outside.
// Broken rules end the launch with std::runtime_error that names kernel, block, threads and source lines.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)

// Vector types, with the alignment that makes one load of them.
#define FASTCONV_VECTOR_TYPES(T, name)                                           \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                             \
  struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                     \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
FASTCONV_VECTOR_TYPES(float, float)
FASTCONV_VECTOR_TYPES(double, double)
FASTCONV_VECTOR_TYPES(int, int)
FASTCONV_VECTOR_TYPES(unsigned, uint)
#undef FASTCONV_VECTOR_TYPES

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulator {

struct Site {  // a place in the source
  const char* file;
  int line;
  bool operator==(const Site&) const = default;
};
#define FASTCONV_SITE ::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

enum class Memory { global_load, global_store, shared_load, shared_store };

extern bool counting;
void count_access(Memory memory, const void* address, size_t bytes, bool active, Site site);
void* dynamic_shared();
void block_barrier(Site site);

// Waits for the threads of the mask. Returns the source lane's value, or where source is `vote`, the mask of
// the lanes whose value is not zero.
inline constexpr int vote = -1;
uint64_t warp_collective(const char* name, unsigned mask, uint64_t value, int source, Site site);
int lane();

// Waits for every lane of the warp; the last one calls combine(data of lane 0, 1, ... 31), which may write to
// what the lanes have brought.
void warp_exchange(const char* name, void* data, void (*combine)(void* const* lanes), Site site);

// Copies to shared memory (of zeros, where `source` is null) in groups, as cp.async makes them: a thread
// ends a group, and waits until at most `pending` of its groups are under way.
void copy_later(void* target, const void* source, size_t bytes);
void end_copy_group();
void wait_for_copy_groups(int pending);

void run(std::string_view kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
         void* arguments);

template <auto Kernel>
const std::string& kernel_name() {  // such as "scale_kernel<float>", without namespaces
  static const std::string result = [](std::string name) {
    name = name.substr(name.find("Kernel = ") + 9);
    name.resize(std::min(name.size(), std::min(name.find("; "), name.rfind(']'))));
    for (size_t end; (end = name.find("::")) != name.npos;) {
      const size_t before = name.find_last_of("<, ", end);
      const size_t begin = before == name.npos ? 0 : before + 1;
      name.erase(begin, end + 2 - begin);
    }
    return name;
  }(__PRETTY_FUNCTION__);
  return result;
}

template <auto Kernel, typename... P>
void launch(void (*)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/,
            std::type_identity_t<P>... values) {
  std::tuple<P...> arguments(values...);
  run(
      kernel_name<Kernel>(), grid, block, shared_bytes,
      [](void* data) { std::apply(Kernel, *static_cast<std::tuple<P...>*>(data)); }, &arguments);
}

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(name, mask, bits, source, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

inline void __syncthreads(FASTCONV_SITE) { emulator::block_barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffff, FASTCONV_SITE) {
  emulator::warp_collective("__syncwarp", mask, 0, emulator::vote, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FASTCONV_SITE) {
  return unsigned(emulator::warp_collective("__ballot_sync", mask, predicate != 0, emulator::vote, site));
}
inline int __any_sync(unsigned mask, int predicate, FASTCONV_SITE) {
  return emulator::warp_collective("__any_sync", mask, predicate != 0, emulator::vote, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FASTCONV_SITE) {
  return emulator::warp_collective("__all_sync", mask, predicate == 0, emulator::vote, site) == 0;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, FASTCONV_SITE) {
  const int first = emulator::lane() & ~(width - 1);
  return emulator::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, FASTCONV_SITE) {
  const int lane = emulator::lane(), source = lane - int(delta);
  return emulator::shuffle("__shfl_up_sync", mask, value, source < (lane & ~(width - 1)) ? lane : source,
                           site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, FASTCONV_SITE) {
  const int lane = emulator::lane(), source = lane + int(delta);
  return emulator::shuffle("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source,
                           site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, FASTCONV_SITE) {
  const int lane = emulator::lane(), source = lane ^ bits;
  return emulator::shuffle("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source,
                           site);
}

// One thread runs at a time, so plain arithmetic is atomic.
template <typename T>
T atomicAdd(T* target, std::type_identity_t<T> value) {
  const T old = *target;
  *target = old + value;
  return old;
}
template <typename T>
T atomicMax(T* target, std::type_identity_t<T> value) {
  const T old = *target;
  if (value > old) *target = value;
  return old;
}
template <typename T>
T atomicMin(T* target, std::type_identity_t<T> value) {
  const T old = *target;
  if (value < old) *target = value;
  return old;
}
template <typename T>
T atomicExch(T* target, std::type_identity_t<T> value) {
  const T old = *target;
  *target = value;
  return old;
}
template <typename T>
T atomicCAS(T* target, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T old = *target;
  if (old == expected) *target = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }
