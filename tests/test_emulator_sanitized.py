"""Sanitizers see what a kernel does wrong in the emulator."""

import subprocess

import pytest
from emulated import CXX, PRELUDE, WITH_COMPILER, compile_cuda

pytestmark = WITH_COMPILER

SANITIZED = r"""
__global__ void copy_kernel(const float* x, float* y, int count, int shared_count) {
  FASTCONV_DYNAMIC_SHARED(float, values);
  __shared__ float fixed[32];
  const bool active = int(threadIdx.x) < count;
  if (int(threadIdx.x) < shared_count) values[threadIdx.x] = load_global(x + threadIdx.x, active);
  fixed[threadIdx.x % 32] = 1;
  __syncthreads();
  float sum = fixed[31] - 1;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
  if (active) store_global(y + threadIdx.x, values[threadIdx.x] + sum);
}
__global__ void fixed_kernel(float* y, int last) {
  __shared__ float fixed[32];
  fixed[int(threadIdx.x) == 31 ? last : int(threadIdx.x)] = 1;
  __syncthreads();
  y[threadIdx.x] = fixed[31 - threadIdx.x];
}
__global__ void stuck_kernel() {
  volatile int frame[64] = {};  // is left on the fiber's stack
  if (threadIdx.x != 5) __syncthreads();
  frame[threadIdx.x] = 1;
}
void copy(const float* x, float* y, int threads, int count, int shared_count) {
  FASTCONV_LAUNCH(copy_kernel, 4, threads, shared_count * 4, nullptr, x, y, count, threads);
}
int main(int, char** arguments) {
  const std::string which = arguments[1];
  std::vector<float> x(64, 3), y(64);
  for (int i = 0; which == "deadlock" && i < 2; ++i) {
    if (std::string(message_of([] { FASTCONV_LAUNCH(stuck_kernel, 1, 64, 0, nullptr); })).empty()) return 1;
    copy(x.data(), y.data(), 64, 64, 64);
  }
  if (which == "right") copy(x.data(), y.data(), 64, 64, 64);
  if (which == "shared") copy(x.data(), y.data(), 64, 64, 63);
  if (which == "load") copy(x.data(), y.data(), 96, 65, 96);
  if (which == "static") FASTCONV_LAUNCH(fixed_kernel, 1, 32, 0, nullptr, y.data(), 32);
  std::puts("done");
}
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    (folder / "probe.cpp").write_text("int main() {}\n")
    probe = subprocess.run(
        [CXX, *flags, str(folder / "probe.cpp"), "-o", str(folder / "probe")], capture_output=True
    )
    if probe.returncode != 0 or subprocess.run([folder / "probe"]).returncode != 0:
        pytest.skip(f"{CXX} has no address sanitizer here")
    (folder / "kernels.cu").write_text(PRELUDE + SANITIZED)
    compile_cuda(folder / "kernels.cu", folder / "kernels", *flags)
    return folder / "kernels"


@pytest.mark.parametrize(
    "which, words",
    [
        ("right", None),
        ("deadlock", None),
        ("shared", "heap-buffer-overflow"),
        ("load", "heap-buffer-overflow"),
        ("static", "out of bounds"),
    ],
)
def test_sanitizers_see_a_step_outside(sanitized, which, words):
    result = subprocess.run([sanitized, which], capture_output=True, text=True)
    if words is None:
        assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    else:
        assert result.returncode != 0
        assert words in result.stderr
