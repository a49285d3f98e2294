// Convolution, C++, direct: pixels against panels of filters.
//
// Formula: conv2d.h. One step: 6 pixels x 64 filters (AVX-512) in registers; for each tap and channel, one
//   value of each of the pixels meets 64 weights. Pixels are counted through rows and images, so no block is
//   cut at the end of a row; a tap outside the image reads zeros from a line kept for that. The taps of a
//   row that lie side by side in memory are one run, so that few channels (a stem has 3) cost no more.
// Bytes: the input from memory once for each chunk of pixels; the weights of a panel of 64 filters from the
//   L2 cache once for each 6 pixels.
// Against plain: sums stay in registers, and no test stands in the inner loop.
// Limits: multiply-adds; few channels with groups, whose runs are short (see conv2d_grouped_cpu.cpp).
#include "conv2d_direct_pass_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// Copies lanes that lie lane_step apart, of which the first `lanes` exist: target(q)[lane] = source[lane *
// step + q].
template <typename T, typename A, typename Target>
void pack_lanes(const T* source, int64_t lane_step, int64_t lanes, int64_t length, const Target& target) {
  constexpr int L = lanes_of<A>;
  int64_t q = 0;
  if (lanes == L && lane_step == 1 && length == 1) {
    store_vector(target(0), load_vector(source));
    return;
  }
  if (lanes == L)
    for (; q + L <= length; q += L)
      transpose_square<A>([&](int lane) { return source + lane * lane_step + q; },
                          [&](int k) { return target(q + k); });
  for (; q < length; ++q)
    for (int64_t lane = 0; lane < L; ++lane)
      target(q)[lane] = lane < lanes ? load(source[lane * lane_step + q]) : A(0);
}

}  // namespace

// Whether a pass multiplies pairs of values.
template <typename T>
bool in_pairs() {
  return std::is_same_v<T, BFloat16> && multiplies_bfloat16();
}

template <typename T>
void direct_pack(const T* weight, accumulate_t<T>* packed, const DirectPass& pass, ParallelFor threads) {
  using A = accumulate_t<T>;
  constexpr int64_t L = lanes_of<A>;
  const Panels<A> panels{pass.to_group};
  const int64_t from = pass.from_group, to = pass.to_group, taps = pass.shape.taps();
  const std::vector<int64_t>& order = pass.geometry.taps;
  std::vector<int64_t> place(taps);  // of a tap, in the packed order
  for (size_t k = 0; k < order.size(); ++k) place[order[k]] = int64_t(k);
  parallel_for(threads, pass.shape.groups * panels.count(), [&](int64_t begin, int64_t end) {
    const Scratch<A> single(in_pairs<T>() ? panels.width * from * taps : 0);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / panels.count(), panel = item % panels.count();
      const int64_t line = panels.vectors(panel) * L, first = panel * panels.width;
      const int64_t offset = (group * panels.padded() + first) * taps;
      A* target = in_pairs<T>() ? single.data() : packed + offset * from;
      for (int64_t v = 0; v < line; v += L) {
        const int64_t lanes = std::min(L, to - first - v);
        const auto at = [&](int64_t tap, int64_t k) { return target + (place[tap] * from + k) * line + v; };
        if (!pass.transposed)  // weight (groups, to, from, taps)
          pack_lanes<T, A>(weight + (group * to + first + v) * from * taps, from * taps, lanes, from * taps,
                           [&](int64_t q) { return at(q % taps, q / taps); });
        else  // weight (groups, from, to, taps)
          for (int64_t k = 0; k < from; ++k)
            pack_lanes<T, A>(weight + ((group * from + k) * to + first + v) * taps, taps, lanes, taps,
                             [&](int64_t q) { return at(q, k); });
      }
      if (!in_pairs<T>()) continue;
      auto* pairs = reinterpret_cast<BFloat16Pair*>(packed) + offset * ceil_div(from, 2);
      for (size_t tap = 0; tap < order.size(); ++tap)
        for (int64_t k = 0; k < from; k += 2)
          for (int64_t lane = 0; lane < line; ++lane, ++pairs) {
            const A* value = target + (tap * from + k) * line + lane;
            store(&pairs->low, float(value[0]));
            store(&pairs->high, k + 1 < from ? float(value[line]) : 0.0f);
          }
    }
  });
}

template <typename T>
void direct_convolve(const T* input, const accumulate_t<T>* packed, const Conv2dEpilogue<T>& epilogue,
                     T* output, const DirectPass& pass, ParallelFor threads) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (in_pairs<T>())
      return avx512_bf16::direct_convolve_pairs(input, reinterpret_cast<const BFloat16Pair*>(packed),
                                                epilogue, output, pass.shape, pass.transposed, pass.source,
                                                threads);
#endif
  const Direct<T, accumulate_t<T>> direct(input, packed, epilogue, output, pass);
  parallel_for(threads, direct.items(), [&](int64_t begin, int64_t end) { direct.compute(begin, end); });
}

template <typename T>
int64_t conv2d_direct_packed_size(const Conv2dShape& s) {
  return direct_forward(s).packed_size<accumulate_t<T>>();
}

template <typename T>
void conv2d_direct_pack_weight_cpu(const T* weight, accumulate_t<T>* packed, const Conv2dShape& s,
                                   ParallelFor threads) {
  direct_pack(weight, packed, direct_forward(s), threads);
}

template <typename T>
void conv2d_direct_forward_cpu(const T* input, const accumulate_t<T>* packed,
                               const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& s,
                               ParallelFor threads) {
  direct_convolve(input, packed, epilogue, output, direct_forward(s), threads);
}

template <typename T>
void conv2d_direct_forward_moments_cpu(const T* input, const T* weight, const T* bias, T* output, T* mean,
                                       T* variance, const Conv2dShape& s, ParallelFor threads) {
  const DirectPass pass = direct_forward(s);
  const Scratch<T> packed(pass.packed_size<T>());
  direct_pack(weight, packed.data(), pass, threads);
  const Conv2dEpilogue<T> epilogue{bias, nullptr, Activation::none};
  Direct<T, T> direct(input, packed.data(), epilogue, output, pass);
  PartMoments moments(direct.counts(), s.out_channels);
  direct.gather(moments);
  parallel_for(threads, direct.items(), [&](int64_t begin, int64_t end) { direct.compute(begin, end); });
  moments.merge(mean, variance);
}

#define FASTCONV_INSTANTIATE(T)                                                                             \
  template void direct_pack(const T*, accumulate_t<T>*, const DirectPass&, ParallelFor);                    \
  template void direct_convolve(const T*, const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*,             \
                                const DirectPass&, ParallelFor);                                            \
  template int64_t conv2d_direct_packed_size<T>(const Conv2dShape&);                                        \
  template void conv2d_direct_pack_weight_cpu(const T*, accumulate_t<T>*, const Conv2dShape&, ParallelFor); \
  template void conv2d_direct_forward_cpu(const T*, const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*,   \
                                          const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)
FASTCONV_CONV2D_INSTANTIATE_MOMENTS(direct, float)
FASTCONV_CONV2D_INSTANTIATE_MOMENTS(direct, double)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY
