// Runs of bytes from one place to another: what kernels share that only move values.
#pragma once

#include <cstring>

#include "simd.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <int B>
struct BytesOf {
  typedef uint8_t type __attribute__((vector_size(B)));
};
template <int B>
using Bytes = typename BytesOf<B>::type;

template <int B>
inline void copy_bytes(char* to, const char* from) {
  Bytes<B> value;
  __builtin_memcpy(&value, from, B);
  __builtin_memcpy(to, &value, B);
}

// Of less than 2 * B bytes: the first half and the last, which may overlap.
template <int B>
inline void copy_short(char* to, const char* from, int64_t bytes) {
  if (bytes >= B) {
    copy_bytes<B>(to, from);
    copy_bytes<B>(to + bytes - B, from + bytes - B);
  } else if constexpr (B > 1) {
    copy_short<B / 2>(to, from, bytes);
  }
}

// memcpy without the call, whose stores, but for the first and the last, cross no cache line.
inline void copy_run(char* to, const char* from, int64_t bytes) {
  constexpr int64_t V = vector_bytes;
  if (bytes < V) return copy_short<V / 2>(to, from, bytes);
  copy_bytes<V>(to, from);
  for (int64_t at = V - int64_t(reinterpret_cast<uintptr_t>(to) % V); at < bytes - V; at += V)
    copy_bytes<V>(to + at, from + at);
  copy_bytes<V>(to + bytes - V, from + bytes - V);
}

// The same, or zeros where there is no `from`.
inline void move_run(char* to, const char* from, int64_t bytes) {
  if (from == nullptr) {
    std::memset(to, 0, bytes);
  } else {
    copy_run(to, from, bytes);
  }
}

// move_run past the caches, but for cache lines of which the run has only a part.
inline void stream_run(char* to, const char* from, int64_t bytes) {
  constexpr int V = vector_bytes;
  const int64_t head = int64_t(-reinterpret_cast<uintptr_t>(to) % V);
  if (bytes < head + V) return move_run(to, from, bytes);
  if (head > 0) move_run(to, from, head);
  int64_t at = head;
  if (from == nullptr) {
    for (; at + V <= bytes; at += V) stream_vector(reinterpret_cast<float*>(to + at), Vector<float>{});
  } else {
    for (; at + V <= bytes; at += V)
      stream_vector(reinterpret_cast<float*>(to + at),
                    load_vector(reinterpret_cast<const float*>(from + at)));
  }
  if (at < bytes) move_run(to + at, from == nullptr ? nullptr : from + at, bytes - at);
}

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY
