#include "counters.h"

#include <algorithm>
#include <utility>

namespace emulator {
namespace {

constexpr uintptr_t sector_bytes = 32, bank_bytes = 4, banks = 32;

int count_distinct(std::vector<uintptr_t>& values) {
  std::sort(values.begin(), values.end());
  return int(std::unique(values.begin(), values.end()) - values.begin());
}

}  // namespace

std::map<std::string, Counters, std::less<>>& all_counters() {
  static std::map<std::string, Counters, std::less<>> counters;
  return counters;
}

void WarpAccesses::add(int lane, Memory memory, const void* address, size_t bytes, bool active, Site site) {
  const int visit = visits_[lane][{site.file, site.line, 0, memory}]++;
  if (!active) return;
  Access& access = accesses_[{site.file, site.line, visit, memory}];
  access.address[lane] = reinterpret_cast<uintptr_t>(address);
  access.bytes[lane] = uint8_t(bytes);
}

void WarpAccesses::count_into(Counters& counters) const {
  std::vector<uintptr_t> touched;
  for (const auto& [key, access] : accesses_) {
    touched.clear();
    const int widest = *std::max_element(access.bytes, access.bytes + 32);
    if (key.memory == Memory::global_load || key.memory == Memory::global_store) {
      int64_t bytes = 0;
      for (int lane = 0; lane < 32; ++lane) {
        if (access.bytes[lane] == 0) continue;
        bytes += access.bytes[lane];
        const uintptr_t last = access.address[lane] + access.bytes[lane] - 1;
        for (uintptr_t sector = access.address[lane] / sector_bytes; sector <= last / sector_bytes; ++sector)
          touched.push_back(sector);
      }
      const bool load = key.memory == Memory::global_load;
      (load ? counters.global_load_requests : counters.global_store_requests) += 1;
      (load ? counters.global_load_sectors : counters.global_store_sectors) += count_distinct(touched);
      (load ? counters.global_load_bytes : counters.global_store_bytes) += bytes;
      continue;
    }
    // Shared memory serves 32 words of 4 bytes at a time: a whole warp, half of it where each lane takes
    // 8 bytes, a quarter where it takes 16. Different words of one bank wait for one another.
    ++counters.shared_requests;
    const int together = widest <= 4 ? 32 : widest <= 8 ? 16 : 8;
    for (int first = 0; first < 32; first += together) {
      touched.clear();
      for (int lane = first; lane < first + together; ++lane) {
        if (access.bytes[lane] == 0) continue;
        const uintptr_t last = access.address[lane] + access.bytes[lane] - 1;
        for (uintptr_t word = access.address[lane] / bank_bytes; word <= last / bank_bytes; ++word)
          touched.push_back(word);
      }
      if (touched.empty()) continue;
      touched.resize(count_distinct(touched));
      int in_bank[banks] = {};
      for (const uintptr_t word : touched) ++in_bank[word % banks];
      const int wavefronts = *std::max_element(in_bank, in_bank + banks);
      counters.shared_wavefronts += wavefronts;
      counters.bank_conflicts += wavefronts - 1;
    }
  }
}

void WarpAccesses::clear() {
  accesses_.clear();
  for (auto& visits : visits_) visits.clear();
}

}  // namespace emulator

// What fastconv/emulator.py calls.

#define FASTCONV_EXPORT extern "C" __attribute__((visibility("default")))

FASTCONV_EXPORT void fastconv_emulator_count(int on) { emulator::counting = on != 0; }

FASTCONV_EXPORT void fastconv_emulator_reset() { emulator::all_counters().clear(); }

// {"kernel": {"launches": 1, ...}, ...}; the text stays valid until the next call.
FASTCONV_EXPORT const char* fastconv_emulator_counters() {
  static std::string text;
  text = "{";
  for (const auto& [kernel, counters] : emulator::all_counters()) {
    text += (text.size() > 1 ? ", \"" : "\"") + kernel + "\": {";
    const std::pair<const char*, int64_t> values[] = {
        {"launches", counters.launches},
        {"blocks", counters.blocks},
        {"threads", counters.threads},
        {"barriers", counters.barriers},
        {"global_load_requests", counters.global_load_requests},
        {"global_load_sectors", counters.global_load_sectors},
        {"global_load_bytes", counters.global_load_bytes},
        {"global_store_requests", counters.global_store_requests},
        {"global_store_sectors", counters.global_store_sectors},
        {"global_store_bytes", counters.global_store_bytes},
        {"shared_requests", counters.shared_requests},
        {"shared_wavefronts", counters.shared_wavefronts},
        {"bank_conflicts", counters.bank_conflicts},
    };
    for (const auto& [name, value] : values)
      text += (text.back() == '{' ? "\"" : ", \"") + std::string(name) + "\": " + std::to_string(value);
    text += "}";
  }
  text += "}";
  return text.c_str();
}
