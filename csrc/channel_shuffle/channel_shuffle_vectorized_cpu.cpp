// Channel shuffle, C++, vectorized: whole runs, or whole vectors of channels.
//
// Formula: channel_shuffle.h. One step copies a run. Where runs are single values (channels_last), one step
//   takes a vector from each of S groups and interleaves them in registers, or, where it is the groups that
//   hold S channels (as in the gradient), the other way round. S is a constant: 2, 3, 4 or 8.
// Bytes: each value is read once and written once.
// Before it: plain moves one value at a time, and divides to find it.
// Limits: one shuffle for each vector and factor 2 of S, two where S is 3; other S look each channel up in a
//   table.
#include <cstring>

#include "../common/simd.h"
#include "channel_shuffle.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// Only bits are moved: types of one size share the code.
template <size_t Size>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};
template <>
struct BitsOf<8> {
  using type = uint64_t;
};

template <typename Bits>
constexpr int lanes = vector_bytes / int(sizeof(Bits));
template <typename Bits>
struct BitVectorOf {
  typedef Bits type __attribute__((vector_size(vector_bytes)));
};

// Two vectors, a0 a1 .. and b0 b1 .., zipped into a0 b0 a1 b1 .., or taken apart again.
template <typename Bits, bool Interleaves>
inline void zip_two(typename BitVectorOf<Bits>::type (&v)[2]) {
  typename BitVectorOf<Bits>::type low{}, high{};  // index lanes + k means lane k of the second vector
  constexpr int L = lanes<Bits>;
#pragma GCC unroll 64
  for (int k = 0; k < L; ++k) {
    low[k] = Bits(Interleaves ? k / 2 + k % 2 * L : 2 * k);
    high[k] = Bits(Interleaves ? L / 2 + k / 2 + k % 2 * L : 2 * k + 1);
  }
  const auto first = v[0], second = v[1];
  v[0] = __builtin_shuffle(first, second, low);
  v[1] = __builtin_shuffle(first, second, high);
}

// Three vectors: two shuffles for each result, the second of which adds what is in the third vector.
template <typename Bits, bool Interleaves>
inline void zip_three(typename BitVectorOf<Bits>::type (&v)[3]) {
  using Vector = typename BitVectorOf<Bits>::type;
  constexpr int L = lanes<Bits>;
  const Vector in[3] = {v[0], v[1], v[2]};
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    Vector two{}, three{};
#pragma GCC unroll 64
    for (int k = 0; k < L; ++k) {
      const int p = Interleaves ? j * L + k : 3 * k + j;  // its number among all values
      const int vector = Interleaves ? p % 3 : p / L, lane = Interleaves ? p / 3 : p % L;
      two[k] = Bits(vector == 0 ? lane : L + lane);
      three[k] = Bits(vector == 2 ? L + lane : k);
    }
    v[j] = __builtin_shuffle(__builtin_shuffle(in[0], in[1], two), in[2], three);
  }
}

// 2, 4 or 8 vectors: each round of zips turns the bits of a value's number (vector, lane) by one place.
template <typename Bits, bool Interleaves, int S>
inline void zip_many(typename BitVectorOf<Bits>::type (&v)[S]) {
  using Vector = typename BitVectorOf<Bits>::type;
#pragma GCC unroll 3
  for (int round = 1; round < S; round *= 2) {
    Vector next[S];
#pragma GCC unroll 4
    for (int i = 0; i < S / 2; ++i) {
      Vector pair[2] = {v[Interleaves ? i : 2 * i], v[Interleaves ? i + S / 2 : 2 * i + 1]};
      zip_two<Bits, Interleaves>(pair);
      next[Interleaves ? 2 * i : i] = pair[0];
      next[Interleaves ? 2 * i + 1 : i + S / 2] = pair[1];
    }
#pragma GCC unroll 8
    for (int i = 0; i < S; ++i) v[i] = next[i];
  }
}

// One pixel: from (S, length) to (length, S), or back.
template <typename Bits, int S, bool Interleaves>
inline void shuffle_pixel(const Bits* input, Bits* output, int64_t length) {
  using Vector = typename BitVectorOf<Bits>::type;
  constexpr int L = lanes<Bits>;
  const auto step = [&](int64_t at) {
    Vector v[S];
    for (int s = 0; s < S; ++s)
      __builtin_memcpy(&v[s], input + (Interleaves ? s * length + at : at * S + s * L), sizeof(Vector));
    if constexpr (S == 3)
      zip_three<Bits, Interleaves>(v);
    else
      zip_many<Bits, Interleaves, S>(v);
    for (int s = 0; s < S; ++s)
      __builtin_memcpy(output + (Interleaves ? at * S + s * L : s * length + at), &v[s], sizeof(Vector));
  };
  if (length < L) {
    for (int64_t at = 0; at < length; ++at)
      for (int s = 0; s < S; ++s)
        output[Interleaves ? at * S + s : s * length + at] =
            input[Interleaves ? s * length + at : at * S + s];
    return;
  }
  for (int64_t at = 0; at + L < length; at += L) step(at);
  step(length - L);  // writes some values again where L does not divide length
}

template <typename Bits, int S, bool Interleaves>
void shuffle_pixels(const Bits* input, Bits* output, const ChannelShuffleShape& s, ParallelFor threads) {
  parallel_for(threads, s.images, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image)
      shuffle_pixel<Bits, S, Interleaves>(input + image * s.channels, output + image * s.channels,
                                          s.channels / S);
  });
}

template <typename Bits>
void look_up(const Bits* input, Bits* output, const ChannelShuffleShape& s, ParallelFor threads) {
  const Scratch<int64_t> table(s.channels);
  for (int64_t channel = 0; channel < s.channels; ++channel) table.data()[channel] = s.source(channel);
  parallel_for(threads, s.images, [&](int64_t begin, int64_t end) {
    const int64_t* sources = table.data();
    for (int64_t image = begin; image < end; ++image) {
      const Bits* from = input + image * s.channels;
      Bits* to = output + image * s.channels;
      for (int64_t channel = 0; channel < s.channels; ++channel) to[channel] = from[sources[channel]];
    }
  });
}

template <typename T>
void copy_runs(const T* input, T* output, const ChannelShuffleShape& s, ParallelFor threads) {
  const int64_t per_group = s.per_group();
  parallel_for(threads, s.images * s.channels, [&](int64_t begin, int64_t end) {
    // Counted, not divided: short runs would wait for it.
    int64_t group = begin % s.groups, place = begin % s.channels / s.groups, image = begin / s.channels;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t source = image * s.channels + group * per_group + place;
      std::memcpy(output + index * s.run, input + source * s.run, s.run * sizeof(T));
      if (++group < s.groups) continue;
      group = 0;
      if (++place < per_group) continue;
      place = 0;
      ++image;
    }
  });
}

template <typename Bits>
void shuffle_values(const Bits* input, Bits* output, const ChannelShuffleShape& s, ParallelFor threads) {
  switch (s.groups) {
    case 2:
      return shuffle_pixels<Bits, 2, true>(input, output, s, threads);
    case 3:
      return shuffle_pixels<Bits, 3, true>(input, output, s, threads);
    case 4:
      return shuffle_pixels<Bits, 4, true>(input, output, s, threads);
    case 8:
      return shuffle_pixels<Bits, 8, true>(input, output, s, threads);
  }
  switch (s.per_group()) {
    case 2:
      return shuffle_pixels<Bits, 2, false>(input, output, s, threads);
    case 3:
      return shuffle_pixels<Bits, 3, false>(input, output, s, threads);
    case 4:
      return shuffle_pixels<Bits, 4, false>(input, output, s, threads);
    case 8:
      return shuffle_pixels<Bits, 8, false>(input, output, s, threads);
  }
  look_up(input, output, s, threads);
}

}  // namespace

template <typename T>
void channel_shuffle_vectorized_forward_cpu(const T* input, T* output, const ChannelShuffleShape& shape,
                                            ParallelFor threads) {
  using Bits = typename BitsOf<sizeof(T)>::type;
  if (shape.groups == 1 || shape.per_group() == 1) {  // nothing moves: an image is one run
    copy_runs(input, output, {shape.images, 1, shape.channels * shape.run, 1}, threads);
  } else if (shape.run > 1) {
    copy_runs(input, output, shape, threads);
  } else {
    shuffle_values(reinterpret_cast<const Bits*>(input), reinterpret_cast<Bits*>(output), shape, threads);
  }
}

#define FASTCONV_INSTANTIATE(T)                                                                     \
  template void channel_shuffle_vectorized_forward_cpu<T>(const T*, T*, const ChannelShuffleShape&, \
                                                          ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY
