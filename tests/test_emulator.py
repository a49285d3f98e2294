"""The CUDA emulator itself: small kernels, compiled here, whose results and costs arithmetic can tell."""

import ctypes

import pytest
from emulated import PRELUDE, WITH_COMPILER, compile_cuda

from fastconv import emulator

pytestmark = WITH_COMPILER

KERNELS = r"""
// A tree in shared memory: wrong unless each barrier holds every thread.
template <typename T, int N>
__global__ void __launch_bounds__(N) block_sum_kernel(const T* x, T* y) {
  __shared__ T sums[N];
  sums[threadIdx.x] = x[blockIdx.x * N + threadIdx.x];
  __syncthreads();
  for (int half = N / 2; half > 0; half /= 2) {
    const T other = int(threadIdx.x) < half ? sums[threadIdx.x + half] : T(0);
    __syncthreads();
    sums[threadIdx.x] += other;
    __syncthreads();
  }
  if (threadIdx.x == 0) y[blockIdx.x] = sums[0];
}
FASTCONV_TEST(block_sum)(const double* x, double* y, int blocks) {
  return message_of([&] { FASTCONV_LAUNCH((block_sum_kernel<double, 64>), blocks, 64, 0, nullptr, x, y); });
}

// Each lane tells what every warp function gives it.
__global__ void warp_kernel(int* y) {
  const int lane = threadIdx.x % 32, at = threadIdx.x;
  const unsigned all = 0xffffffff;
  const int n = blockDim.x;
  y[0 * n + at] = __shfl_sync(all, lane * 10, 5);
  y[1 * n + at] = __shfl_sync(all, lane * 10, 3, 8);
  y[2 * n + at] = __shfl_up_sync(all, lane, 2);
  y[3 * n + at] = __shfl_down_sync(all, lane, 2, 16);
  y[4 * n + at] = __shfl_xor_sync(all, lane, 16);
  y[5 * n + at] = int(__ballot_sync(all, lane % 3 == 0));
  y[6 * n + at] = __any_sync(all, lane == 31) * 2 + __all_sync(all, lane < 31);
  if (lane < 8) y[7 * n + at] = __shfl_xor_sync(0xff, lane, 1);  // a part of the warp
  __syncwarp();
  y[8 * n + at] = at / 32;
}
FASTCONV_TEST(warp)(int* y, int threads) {
  return message_of([&] { FASTCONV_LAUNCH(warp_kernel, 1, threads, 0, nullptr, y); });
}

__global__ void atomics_kernel(int* counts, float* sum, unsigned* largest) {
  atomicAdd(&counts[threadIdx.x % 4], 1);
  atomicAdd(sum, 0.5f);
  atomicMax(largest, threadIdx.x + blockIdx.x * blockDim.x);
}
FASTCONV_TEST(atomics)(int* counts, float* sum, unsigned* largest) {
  return message_of([&] {
    FASTCONV_LAUNCH(atomics_kernel, dim3(2, 3), dim3(8, 4, 2), 0, nullptr, counts, sum, largest);
  });
}

// Every thread's place, in the order of a GPU.
__global__ void places_kernel(int* y) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  y[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}
FASTCONV_TEST(places)(int* y) {
  return message_of([&] { FASTCONV_LAUNCH(places_kernel, dim3(2, 2, 2), dim3(3, 2, 2), 0, nullptr, y); });
}

// Dynamic shared memory starts a block as NaN, whatever the block before has left.
__global__ void fresh_kernel(float* y) {
  FASTCONV_DYNAMIC_SHARED(float, values);
  y[blockIdx.x * 32 + threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = 1;
}
FASTCONV_TEST(fresh)(float* y) {
  return message_of([&] { FASTCONV_LAUNCH(fresh_kernel, 2, 32, 32 * sizeof(float), nullptr, y); });
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void missing_lane_kernel(int* y) {
  if (threadIdx.x != 7) y[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 1);
  else __syncthreads();
}
__global__ void outside_mask_kernel(int* y) { y[threadIdx.x] = __any_sync(0xf, 1); }
__global__ void absent_source_kernel(int* y) {
  if (threadIdx.x < 4) y[threadIdx.x] = __shfl_sync(0xf, 1, 4);
}
__global__ void throwing_kernel() {
  if (threadIdx.x == 3) throw std::runtime_error("from a thread");
  __syncthreads();
}
FASTCONV_TEST(mistake)(int which, int* y) {
  return message_of([&] {
    if (which == 0) FASTCONV_LAUNCH(divergent_barrier_kernel, 3, 64, 0, nullptr);
    if (which == 1) FASTCONV_LAUNCH(two_barriers_kernel, 1, 64, 0, nullptr);
    if (which == 2) FASTCONV_LAUNCH(missing_lane_kernel, 1, 32, 0, nullptr, y);
    if (which == 3) FASTCONV_LAUNCH(outside_mask_kernel, 1, 32, 0, nullptr, y);
    if (which == 4) FASTCONV_LAUNCH(absent_source_kernel, 1, 32, 0, nullptr, y);
    if (which == 5) FASTCONV_LAUNCH(throwing_kernel, 1, 32, 0, nullptr);
    if (which == 6) FASTCONV_LAUNCH(throwing_kernel, 1, 2048, 0, nullptr);
    if (which == 7) FASTCONV_LAUNCH(throwing_kernel, dim3(1, 70000), 32, 0, nullptr);
    if (which == 8) FASTCONV_LAUNCH(throwing_kernel, 1, 32, 300000, nullptr);
  });
}

// Lane i touches value i * stride, of 4, 8 or 16 bytes.
template <typename T>
__global__ void strided_kernel(const T* x, T* y, int stride, int lanes) {
  FASTCONV_DYNAMIC_SHARED(T, values);
  const bool active = int(threadIdx.x) < lanes;
  const T value = load_global(x + threadIdx.x * stride, active);
  store_shared(values + threadIdx.x * stride, value, active);
  store_global(y + threadIdx.x, load_shared(values + threadIdx.x * stride, active), active);
}
template <typename T>
void strided(int stride, int lanes) {
  alignas(128) static unsigned char x[32 * 33 * 16], y[32 * 16];
  FASTCONV_LAUNCH(strided_kernel<T>, 1, 32, 32 * stride * sizeof(T), nullptr, reinterpret_cast<const T*>(x),
                  reinterpret_cast<T*>(y), stride, lanes);
}
FASTCONV_TEST(strided_access)(int bytes, int stride, int lanes) {
  return message_of([&] {
    if (bytes == 4) strided<float>(stride, lanes);
    if (bytes == 8) strided<double>(stride, lanes);
    if (bytes == 16) strided<float4>(stride, lanes);
  });
}
// Lanes skip different rounds of a loop: round i of one lane belongs to round i of the others all the same.
__global__ void ragged_kernel(const float* x, float* y) {
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += load_global(x + i * 32 + threadIdx.x, (threadIdx.x + i) % 2 == 0);
  y[threadIdx.x] = sum;
}
FASTCONV_TEST(ragged)(float* y) {
  alignas(128) static float x[128];
  return message_of([&] { FASTCONV_LAUNCH(ragged_kernel, 1, 32, 0, nullptr, x, y); });
}

// What a thread copies to shared memory, seen before and after it waits for each of two groups.
__global__ void copies_kernel(const float* x, float* y) {
  __shared__ float values[2];
  const auto look = [&](int row) {
    y[2 * row] = values[0];
    y[2 * row + 1] = values[1];
  };
  values[0] = values[1] = 0;
  copy_to_shared(&values[0], x, true);
  end_copy_group();
  copy_to_shared(&values[1], x + 1, true);
  look(0);
  end_copy_group();
  wait_for_copy_groups<1>();
  look(1);
  copy_to_shared(&values[0], x, false);
  wait_for_copies();
  look(2);
}
FASTCONV_TEST(copies)(const float* x, float* y) {
  return message_of([&] { FASTCONV_LAUNCH(copies_kernel, 1, 1, 0, nullptr, x, y); });
}

// d (16, 8) += a (16, 16) * b (16, 8), each fragment gathered value by value as PTX numbers them.
template <typename T>
__global__ void mma_kernel(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto two = [](float low, float high) {
    return uint32_t(rounded<T>(low).bits) | uint32_t(rounded<T>(high).bits) << 16;
  };
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {  // registers a0a1, a2a3, a4a5, a6a7
    const float* from = a + (g + (i == 1 || i == 3 ? 8 : 0)) * 16 + 2 * t + (i < 2 ? 0 : 8);
    left[i] = two(from[0], from[1]);
    sums[i] = d[(i < 2 ? g : g + 8) * 8 + 2 * t + (i & 1)];
  }
  for (int i = 0; i < 2; ++i) right[i] = two(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
  mma_m16n8k16<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) d[(i < 2 ? g : g + 8) * 8 + 2 * t + (i & 1)] = sums[i];
}
// The same, with fragments that come from shared memory: a lies as (row, k) or (k, row), b as (k, column).
template <typename T, bool Turned>
__global__ void loaded_mma_kernel(const float* a, const float* b, float* d) {
  alignas(16) __shared__ T left[16][16];
  alignas(16) __shared__ T right[16][16];  // columns 8 to 15 are of no use
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) {
    left[i / 16][i % 16] = rounded<T>(a[Turned ? i % 16 * 16 + i / 16 : i]);
    right[i / 16][i % 16] = rounded<T>(i % 16 < 8 ? b[i / 16 * 8 + i % 16] : 1000.0f);
  }
  __syncwarp();
  uint32_t rows[4], columns[4];
  load_matrices<Turned>(rows, Turned ? &left[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]
                                     : &left[lane % 16][lane / 16 * 8]);
  load_matrices<true>(columns, &right[lane % 16][lane / 16 * 8]);
  float sums[4] = {d[g * 8 + 2 * t], d[g * 8 + 2 * t + 1], d[g * 8 + 64 + 2 * t], d[g * 8 + 65 + 2 * t]};
  mma_m16n8k16<T>(sums, rows, {columns[0], columns[1]});
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}
FASTCONV_TEST(mma)(int which, const float* a, const float* b, float* d) {
  return message_of([&] {
    if (which == 0) FASTCONV_LAUNCH(mma_kernel<Float16>, 1, 32, 0, nullptr, a, b, d);
    if (which == 1) FASTCONV_LAUNCH(mma_kernel<BFloat16>, 1, 32, 0, nullptr, a, b, d);
    if (which == 2) FASTCONV_LAUNCH((loaded_mma_kernel<Float16, false>), 1, 32, 0, nullptr, a, b, d);
    if (which == 3) FASTCONV_LAUNCH((loaded_mma_kernel<BFloat16, true>), 1, 32, 0, nullptr, a, b, d);
  });
}
__global__ void short_mma_kernel(float* d) {
  if (threadIdx.x % 32 == 9) return;
  float sums[4];
  mma_m16n8k16<Float16>(sums, {1, 2, 3, 4}, {5, 6});
}
__global__ void uneven_rows_kernel() {
  alignas(16) __shared__ Float16 values[64];
  uint32_t rows[4];
  load_matrices<false>(rows, values + threadIdx.x);
}
__global__ void uneven_copy_kernel(const float4* x) {
  alignas(16) __shared__ float4 values[2];
  copy_to_shared(reinterpret_cast<float4*>(reinterpret_cast<float*>(values) + 1), x, true);
}
FASTCONV_TEST(matrix_mistake)(int which, float* d) {
  return message_of([&] {
    if (which == 0) FASTCONV_LAUNCH(short_mma_kernel, 1, 64, 0, nullptr, d);
    if (which == 1) FASTCONV_LAUNCH(short_mma_kernel, 1, 8, 0, nullptr, d);
    if (which == 2) FASTCONV_LAUNCH(uneven_rows_kernel, 1, 32, 0, nullptr);
    if (which == 3) FASTCONV_LAUNCH(uneven_copy_kernel, 1, 32, 0, nullptr, reinterpret_cast<float4*>(d));
  });
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The kernels above as a library, and with the emulator's counters."""
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "kernels.cu").write_text(PRELUDE + KERNELS)
    compile_cuda(folder / "kernels.cu", folder / "libkernels.so", "-shared", "-fPIC")
    return emulator._bind(folder / "libkernels.so")


def run(function, *arguments) -> str:
    function.restype = ctypes.c_char_p
    return function(*arguments).decode()


def test_barriers_and_static_shared_memory(kernels):
    x, y = (ctypes.c_double * 256)(*range(256)), (ctypes.c_double * 4)()
    assert run(kernels.block_sum, x, y, 4) == ""
    assert list(y) == [sum(range(64 * b, 64 * b + 64)) for b in range(4)]


@pytest.mark.parametrize("threads", [32, 96])
def test_warp_functions(kernels, threads):
    y = (ctypes.c_int * (9 * threads))()
    assert run(kernels.warp, y, threads) == ""
    rows = [list(y[i * threads : (i + 1) * threads]) for i in range(9)]
    lanes = [i % 32 for i in range(threads)]
    assert rows[0] == [50] * threads
    assert rows[1] == [(lane // 8 * 8 + 3) * 10 for lane in lanes]
    assert rows[2] == [max(lane - 2, 0) if lane >= 2 else lane for lane in lanes]
    assert rows[3] == [lane + 2 if lane % 16 < 14 else lane for lane in lanes]
    assert rows[4] == [lane ^ 16 for lane in lanes]
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    assert rows[5] == [ctypes.c_int(ballot).value] * threads
    assert rows[6] == [2] * threads
    assert rows[7] == [lane ^ 1 if lane < 8 else 0 for lane in lanes]
    assert rows[8] == [i // 32 for i in range(threads)]


def test_atomics(kernels):
    counts, total, largest = (ctypes.c_int * 4)(), ctypes.c_float(), ctypes.c_uint()
    assert run(kernels.atomics, counts, ctypes.byref(total), ctypes.byref(largest)) == ""
    assert list(counts) == [6 * 64 / 4] * 4
    assert total.value == 6 * 64 * 0.5
    assert largest.value == 1 * 8 + 7


def test_places_of_threads_and_blocks(kernels):
    y = (ctypes.c_int * 96)()
    assert run(kernels.places, y) == ""
    assert list(y) == [block * 1000 + thread for block in range(8) for thread in range(12)]


def test_dynamic_shared_memory_starts_as_nan(kernels):
    y = (ctypes.c_float * 64)()
    assert run(kernels.fresh, y) == ""
    assert all(value != value for value in y)


MISTAKES = {
    0: [
        "divergent_barrier_kernel",
        "block (0, 0, 0)",
        "24 have returned",
        "40 wait in __syncthreads",
        "kernels.cu:",
    ],
    1: ["two_barriers_kernel", "__syncthreads at kernels.cu:", "thread (0, 0, 0)", "thread (63, 0, 0)"],
    2: ["missing_lane_kernel", "31 wait in __shfl_xor_sync", "1 wait in __syncthreads", "thread (7, 0, 0)"],
    3: ["outside_mask_kernel", "thread (4, 0, 0)", "__any_sync", "leaves it out"],
    4: ["absent_source_kernel", "__shfl_sync", "reads lane 4"],
    5: ["from a thread"],
    6: ["throwing_kernel", "a GPU refuses this launch", "2048"],
    7: ["throwing_kernel", "a GPU refuses this launch", "70000"],
    8: ["throwing_kernel", "a GPU refuses this launch", "300000 bytes"],
}


@pytest.mark.parametrize("which", MISTAKES)
def test_mistakes_are_named(kernels, which):
    y = (ctypes.c_int * 64)()
    message = run(kernels.mistake, which, y)
    for words in MISTAKES[which]:
        assert words in message
    # and the emulator goes on as before
    test_warp_functions(kernels, 32)


def test_copies_arrive_when_they_are_waited_for(kernels):
    y = (ctypes.c_float * 6)()
    assert run(kernels.copies, (ctypes.c_float * 2)(3, 4), y) == ""
    assert list(y) == [0, 0, 3, 0, 0, 4]


@pytest.mark.parametrize("which", range(4))
def test_matrix_product_of_a_warp(kernels, which):
    a = [[16 * row + k - 100 for k in range(16)] for row in range(16)]  # exact in both types
    b = [[(8 * k + column) * (1 if k % 2 else -1) for column in range(8)] for k in range(16)]
    d = (ctypes.c_float * 128)(*range(128))
    flat = [(ctypes.c_float * len(m * len(m[0])))(*(v for row in m for v in row)) for m in (a, b)]
    assert run(kernels.mma, which, *flat, d) == ""
    assert list(d) == [
        8 * row + column + sum(a[row][k] * b[k][column] for k in range(16))
        for row in range(16)
        for column in range(8)
    ]


MATRIX_MISTAKES = {
    0: ["short_mma_kernel", "mma_m16n8k16 at kernels.cu:", "lane 9", "does not take part"],
    1: ["short_mma_kernel", "lane 8", "does not take part"],
    2: ["16-byte boundary"],
    3: ["uneven_copy_kernel", "16 bytes", "no multiple"],
}


@pytest.mark.parametrize("which", MATRIX_MISTAKES)
def test_mistakes_with_matrices_are_named(kernels, which):
    message = run(kernels.matrix_mistake, which, (ctypes.c_float * 8)())
    for words in MATRIX_MISTAKES[which]:
        assert words in message
    test_matrix_product_of_a_warp(kernels, 0)


def count(kernels, function, *arguments) -> dict:
    kernels.fastconv_emulator_reset()
    kernels.fastconv_emulator_count(1)
    try:
        assert run(function, *arguments) == ""
    finally:
        kernels.fastconv_emulator_count(0)
    (values,) = emulator._read(kernels).values()
    return values


# bytes of a value, stride in values, lanes -> sectors of the load, wavefronts of one shared access
# A sector has 32 bytes; a wavefront serves 32 banks of 4 bytes, so it serves 8 lanes of 16 bytes.
COSTS = {
    (4, 1, 32): (4, 1),
    (4, 2, 32): (8, 2),
    (4, 8, 32): (32, 8),
    (4, 32, 32): (32, 32),
    (4, 33, 32): (32, 1),
    (4, 3, 32): (12, 1),
    (4, 32, 5): (5, 5),
    (8, 1, 32): (8, 2),
    (8, 2, 32): (16, 4),
    (16, 1, 32): (16, 4),
    (16, 2, 32): (32, 8),
    (4, 1, 8): (1, 1),
}


@pytest.mark.parametrize("bytes_, stride, lanes", COSTS)
def test_counters_are_what_arithmetic_says(kernels, bytes_, stride, lanes):
    sectors, wavefronts = COSTS[bytes_, stride, lanes]
    values = count(kernels, kernels.strided_access, bytes_, stride, lanes)
    assert values["launches"] == values["blocks"] == 1
    assert values["threads"] == 32
    assert values["global_load_requests"] == 1
    assert values["global_load_bytes"] == values["global_store_bytes"] == lanes * bytes_
    assert values["global_load_sectors"] == sectors
    assert values["load_efficiency"] == lanes * bytes_ / (32 * sectors)
    assert values["global_store_sectors"] == max(lanes * bytes_ // 32, 1)
    turns = -(-lanes * bytes_ // 128)  # without conflicts
    assert values["shared_requests"] == 2
    assert values["shared_wavefronts"] == 2 * wavefronts
    assert values["bank_conflicts"] == 2 * (wavefronts - turns)


def test_a_skipped_access_does_not_shift_the_others(kernels):
    values = count(kernels, kernels.ragged, (ctypes.c_float * 32)())
    assert values["global_load_requests"] == 4
    assert values["global_load_sectors"] == 16
    assert values["global_load_bytes"] == 4 * 16 * 4


def test_nothing_is_counted_unless_asked(kernels):
    kernels.fastconv_emulator_reset()
    assert run(kernels.ragged, (ctypes.c_float * 32)()) == ""
    assert emulator._read(kernels) == {}
