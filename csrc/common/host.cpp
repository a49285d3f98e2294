// The module fastconv._host: what this machine can do, free of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstring>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "cpu.h"
#include "peak.h"

namespace fastconv {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The instruction sets that this processor has, the plainest first.
std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (int i = 0; i <= int(best_cpu_capability()); ++i)
    names.push_back(cpu_capability_name(CpuCapability(i)));
  return names;
}

void check(const char* name, bool holds, const char* allowed, const std::string& got) {
  if (!holds) throw std::invalid_argument(std::string(name) + " must be " + allowed + ", got " + got);
}

// The highest rate of `work` in any of forty windows, all threads together: other programs on the machine can
// only lower a window's rate. `prepare(thread)` comes first; `work(thread)` returns an amount.
template <typename Prepare, typename Work>
double best_rate(int threads, double seconds, const Prepare& prepare, const Work& work) {
  check("threads", threads >= 1 && threads <= 4096, "between 1 and 4096", std::to_string(threads));
  check("seconds", seconds > 0 && seconds <= 60, "above 0 and at most 60", std::to_string(seconds));
  constexpr int windows = 40;
  std::vector<std::vector<double>> rates(threads, std::vector<double>(windows));
  std::vector<std::exception_ptr> errors(threads);
  std::barrier together(threads);
  auto run = [&](int thread) {
    try {
      prepare(thread);
    } catch (...) {
      errors[thread] = std::current_exception();
    }
    for (int window = 0; window < windows; ++window) {
      together.arrive_and_wait();
      if (std::any_of(errors.begin(), errors.end(), [](const auto& error) { return error != nullptr; }))
        return;
      const auto start = Clock::now();
      double done = 0, elapsed = 0;
      do {
        done += work(thread);
        elapsed = seconds_since(start);
      } while (elapsed < seconds / windows);
      rates[thread][window] = done / elapsed;
    }
  };
  std::vector<std::thread> pool;
  for (int thread = 1; thread < threads; ++thread) pool.emplace_back(run, thread);
  run(0);
  for (auto& thread : pool) thread.join();
  for (const auto& error : errors)
    if (error) std::rethrow_exception(error);
  double best = 0;
  for (int window = 0; window < windows; ++window) {
    double sum = 0;
    for (int thread = 0; thread < threads; ++thread) sum += rates[thread][window];
    best = std::max(best, sum);
  }
  return best;
}

template <typename T>
double fma_peak(int threads, double seconds) {
  return best_rate(
      threads, seconds, [](int) {},
      [](int) {
        int64_t operations = 0;
        FASTCONV_CALL_CPU(multiply_add<T>(20000, operations))
        return double(operations);
      });
}

double copy_rate(int64_t bytes, int threads, double seconds) {
  check("bytes", bytes >= 128, "at least 128", std::to_string(bytes));
  struct Part {
    std::vector<char> source, target;
  };
  std::vector<Part> parts(std::max(threads, 1));
  const int64_t each = std::max<int64_t>(bytes / 2 / std::max(threads, 1), 64);
  return best_rate(
      threads, seconds,
      [&](int thread) {  // each thread touches its own part first, so that the memory is near it
        parts[thread].source.assign(each, char(thread + 1));
        parts[thread].target.assign(each, char(0));
      },
      [&](int thread) {
        const int64_t repeats = std::max<int64_t>(1, (1 << 20) / each);
        for (int64_t i = 0; i < repeats; ++i) {
          std::memcpy(parts[thread].target.data(), parts[thread].source.data(), each);
          std::atomic_signal_fence(std::memory_order_seq_cst);  // every copy must happen
        }
        return 2.0 * double(each) * double(repeats);
      });
}

bool built_with_cuda() {
#if defined(FASTCONV_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace fastconv

PYBIND11_MODULE(_host, module) {
  namespace py = pybind11;
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "What this machine can do: instruction sets, and the limits of arithmetic and memory.";
  module.def(
      "cpu_capability", [] { return fastconv::cpu_capability_name(fastconv::cpu_capability()); },
      "The instruction set that the C++ kernels use here: 'portable', 'avx2' or 'avx512'.\n\n"
      "It is the best of this processor, or the one that FASTCONV_CPU_CAPABILITY names.");
  module.def("cpu_capabilities", &fastconv::cpu_capabilities,
             "The instruction sets that this processor can run, the plainest first.");
  module.def("built_with_cuda", &fastconv::built_with_cuda, "Whether the library holds the CUDA kernels.");
  module.def("fma_peak", &fastconv::fma_peak<float>, py::arg("threads"), py::arg("seconds") = 0.2, release(),
             "FLOP/s of float32 multiply-adds in registers, two for each; the best of forty windows.");
  module.def("fma_peak_double", &fastconv::fma_peak<double>, py::arg("threads"), py::arg("seconds") = 0.2,
             release(), "The same of float64.");
  module.def(
      "copy_rate", &fastconv::copy_rate, py::arg("bytes"), py::arg("threads"), py::arg("seconds") = 0.2,
      release(),
      "Bytes/s of a copy that reads and writes `bytes` in all, both counted; the best of forty windows.\n\n"
      "A size that fits the caches measures the caches.");
}
