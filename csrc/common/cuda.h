// The one include of a .cu file: CUDA under nvcc, the emulator (csrc/emulator) under -DFASTCONV_EMULATOR.
//
// Kernels touch memory through the functions below. Under nvcc they are plain loads and stores; the emulator
// counts them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(FASTCONV_EMULATOR)
#include "emulator.h"
#else
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <type_traits>
#endif

#include "types.h"

namespace fastconv {

#if defined(FASTCONV_EMULATOR)
#define FASTCONV_ACCESS(memory, address, active) \
  if (::emulator::counting)                      \
  ::emulator::count_access(::emulator::Memory::memory, address, sizeof(T), active, site)
#define FASTCONV_AND_SITE , FASTCONV_SITE
#else
#define FASTCONV_ACCESS(memory, address, active)
#define FASTCONV_AND_SITE
#endif

// The value at `address`, or zero without a look at it where `active` is false. Lanes of a warp that differ
// in `active` still make one access.
template <typename T>
__device__ __forceinline__ T load_global(const T* address, bool active = true FASTCONV_AND_SITE) {
  FASTCONV_ACCESS(global_load, address, active);
  return active ? *address : T{};
}

template <typename T>
__device__ __forceinline__ void store_global(T* address, std::type_identity_t<T> value,
                                             bool active = true FASTCONV_AND_SITE) {
  FASTCONV_ACCESS(global_store, address, active);
  if (active) *address = value;
}

template <typename T>
__device__ __forceinline__ T load_shared(const T* address, bool active = true FASTCONV_AND_SITE) {
  FASTCONV_ACCESS(shared_load, address, active);
  return active ? *address : T{};
}

template <typename T>
__device__ __forceinline__ void store_shared(T* address, std::type_identity_t<T> value,
                                             bool active = true FASTCONV_AND_SITE) {
  FASTCONV_ACCESS(shared_store, address, active);
  if (active) *address = value;
}

// Starts to copy one value of 2, 4, 8 or 16 bytes to shared memory, or zero where `active` is false. The
// value is there after wait_for_copies() and a barrier; meanwhile it takes no register.
template <typename T>
__device__ __forceinline__ void copy_to_shared(T* shared, const T* global, bool active FASTCONV_AND_SITE) {
  FASTCONV_ACCESS(global_load, global, active);
  FASTCONV_ACCESS(shared_store, shared, true);
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) >= 4) {
    __pipeline_memcpy_async(shared, global, sizeof(T), active ? 0 : sizeof(T));
    return;
  }
#endif
  *shared = active ? *global : T{};
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  __pipeline_commit();
  __pipeline_wait_prior(0);
#endif
}
#undef FASTCONV_ACCESS
#undef FASTCONV_AND_SITE

// A value as it is stored.
template <typename T>
__device__ __forceinline__ T rounded(accumulate_t<T> value) {
  T result;
  store(&result, value);
  return result;
}

// T* name: the shared memory whose size the launch gives, on a 16-byte boundary.
#if defined(FASTCONV_EMULATOR)
#define FASTCONV_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::emulator::dynamic_shared())
#else
#define FASTCONV_DYNAMIC_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char fastconv_shared_bytes[]; \
  T* const name = reinterpret_cast<T*>(fastconv_shared_bytes)
#endif

// FASTCONV_LAUNCH((kernel<T, 3>), grid, block, shared_bytes, stream, arguments...) starts a kernel on a
// stream (a cudaStream_t as void*) of the current device, and throws std::runtime_error with the kernel's
// name if it cannot.
#if defined(FASTCONV_EMULATOR)
#define FASTCONV_LAUNCH(kernel, ...) ::emulator::launch<kernel>(kernel, __VA_ARGS__)
#else
#define FASTCONV_LAUNCH(kernel, ...) ::fastconv::launch(#kernel, kernel, __VA_ARGS__)

inline void check_cuda(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call that asks would find it
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

template <typename... P>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            std::type_identity_t<P>... arguments) {
  if (shared_bytes > 48 << 10)  // more has to be asked for
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
               name);
  void* const values[] = {const_cast<void*>(static_cast<const void*>(&arguments))..., nullptr};
  check_cuda(cudaLaunchKernel(kernel, grid, block, const_cast<void**>(values), shared_bytes,
                              static_cast<cudaStream_t>(stream)),
             name);
}
#endif

FASTCONV_HOST_DEVICE constexpr int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// A count of blocks as a grid's x.
inline unsigned grid_size(int64_t blocks) {
  if (blocks > 0x7fffffff)
    throw std::runtime_error("a CUDA grid has at most 2^31 - 1 blocks, this size needs " +
                             std::to_string(blocks));
  return unsigned(blocks);
}

// A quantity that a kernel computes in 32 bits.
inline int narrow(int64_t value, const char* what) {
  if (value > 0x7fffffff || value < -0x7fffffff)
    throw std::runtime_error(std::string(what) + " must be below 2^31 for a CUDA kernel, got " +
                             std::to_string(value));
  return int(value);
}

}  // namespace fastconv
