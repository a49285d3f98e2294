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
// value is there after wait_for_copies() and a barrier; meanwhile it takes no register (but 2 bytes, for
// which there is no such copy, go through one at once).
template <typename T>
__device__ __forceinline__ void copy_to_shared(T* shared, const T* global, bool active FASTCONV_AND_SITE) {
  FASTCONV_ACCESS(global_load, global, active);
  FASTCONV_ACCESS(shared_store, shared, true);
  if constexpr (sizeof(T) >= 4) {
#if defined(FASTCONV_EMULATOR)
    ::emulator::copy_later(shared, active ? global : nullptr, sizeof(T));
#elif defined(__CUDA_ARCH__)
    __pipeline_memcpy_async(shared, global, sizeof(T), active ? 0 : sizeof(T));
#endif
  } else {
    *shared = active ? *global : T{};
  }
}

// Ends a group of copies: those that the thread has started since the group before.
__device__ __forceinline__ void end_copy_group() {
#if defined(FASTCONV_EMULATOR)
  ::emulator::end_copy_group();
#elif defined(__CUDA_ARCH__)
  __pipeline_commit();
#endif
}

// Waits for the thread's groups, all but the last `Pending`.
template <int Pending>
__device__ __forceinline__ void wait_for_copy_groups() {
#if defined(FASTCONV_EMULATOR)
  ::emulator::wait_for_copy_groups(Pending);
#elif defined(__CUDA_ARCH__)
  __pipeline_wait_prior(Pending);
#endif
}

__device__ __forceinline__ void wait_for_copies() {
  end_copy_group();
  wait_for_copy_groups<0>();
}

// A warp's matrices for its tensor core, in the fragments of PTX's mma.m16n8k16: a register has two values,
// of adjacent k (a, b); with g = lane / 4 and t = lane % 4,
//   a[0..3]: rows g, g + 8, g, g + 8, k from 2t, 2t, 2t + 8, 2t + 8;   b[0..1]: column g, k from 2t, 2t + 8;
//   sums[0..3]: rows g, g, g + 8, g + 8, columns 2t, 2t + 1, 2t, 2t + 1.
#if defined(FASTCONV_EMULATOR)
struct MmaOperands {
  float* sums;
  const uint32_t *a, *b;
};
struct MatrixRow {
  const uint16_t* row;
  uint32_t* values;
};
#endif

// sums (16, 8) += a (16, 16) * b (16, 8). T: Float16 or BFloat16. Every lane of the warp has to call it.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2] FASTCONV_AND_SITE) {
  static_assert(sizeof(T) == 2);
#if defined(FASTCONV_EMULATOR)
  MmaOperands mine{sums, a, b};
  const auto combine = [](void* const* lanes) {
    const auto value = [](uint32_t word, int half) { return load(T{uint16_t(word >> (16 * half))}); };
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& operands = *static_cast<const MmaOperands*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          left[g + i % 2 * 8][2 * t + half + i / 2 * 8] = value(operands.a[i], half);
        for (int i = 0; i < 2; ++i) right[2 * t + half + i * 8][g] = value(operands.b[i], half);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        static_cast<const MmaOperands*>(lanes[lane])->sums[i] += sum;
      }
  };
  ::emulator::warp_exchange("mma_m16n8k16", &mine, combine, site);
#elif defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, Float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Four 8 x 8 matrices of 2-byte values from shared memory: lane l gives the address of row l % 8 (16 bytes,
// on a 16-byte boundary) of matrix l / 8, and gets from each matrix row g, columns 2t and 2t + 1; of its
// transpose, where Transposed.
template <bool Transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&values)[4], const void* row FASTCONV_AND_SITE) {
#if defined(FASTCONV_EMULATOR)
  if (::emulator::counting) ::emulator::count_access(::emulator::Memory::shared_load, row, 16, true, site);
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    throw std::runtime_error("load_matrices: a row is not on a 16-byte boundary");
  MatrixRow mine{static_cast<const uint16_t*>(row), values};
  const auto combine = [](void* const* lanes) {
    const auto of = [&](int lane) { return *static_cast<const MatrixRow*>(lanes[lane]); };
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t low = Transposed ? of(8 * i + 2 * t).row[g] : of(8 * i + g).row[2 * t];
        const uint32_t high = Transposed ? of(8 * i + 2 * t + 1).row[g] : of(8 * i + g).row[2 * t + 1];
        of(lane).values[i] = low | high << 16;
      }
  };
  ::emulator::warp_exchange("load_matrices", &mine, combine, site);
#elif defined(__CUDA_ARCH__)
  const unsigned address = unsigned(__cvta_generic_to_shared(row));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(address)
                 : "memory");
  }
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
