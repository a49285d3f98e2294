// What a kernel's memory accesses cost a GPU, counted warp by warp.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace emulator {

struct Counters {
  int64_t launches = 0, blocks = 0, threads = 0, barriers = 0;
  int64_t global_load_requests = 0, global_load_sectors = 0, global_load_bytes = 0;
  int64_t global_store_requests = 0, global_store_sectors = 0, global_store_bytes = 0;
  int64_t shared_requests = 0, shared_wavefronts = 0, bank_conflicts = 0;
};

// The accesses of one warp. Lanes that are at the same source line for the same time make one access, as
// threads of a warp that run in step do; so an access that some lanes skip has to be written with a
// condition, load_global(address, condition), for later ones to be matched rightly.
class WarpAccesses {
 public:
  void add(int lane, Memory memory, const void* address, size_t bytes, bool active, Site site);
  void count_into(Counters& counters) const;
  void clear();

 private:
  struct Key {
    const char* file;
    int line;
    int visit;
    Memory memory;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      const uint64_t bits = uint64_t(key.visit) << 24 ^ uint64_t(key.line) << 2 ^ uint64_t(key.memory);
      return (bits ^ reinterpret_cast<uintptr_t>(key.file)) * 0x9e3779b97f4a7c15u >> 16;
    }
  };
  struct Access {
    uintptr_t address[32];
    uint8_t bytes[32] = {};  // 0: the lane does not take part
  };

  std::unordered_map<Key, Access, Hash> accesses_;
  std::unordered_map<Key, int, Hash> visits_[32];  // how often a lane has been at a line (visit: 0)
};

std::map<std::string, Counters, std::less<>>& all_counters();

}  // namespace emulator
