// Channel shuffle, C++, plain: the formula.
//
// Formula: channel_shuffle.h. One step of the inner loop copies one value.
// Bytes: each value is read once and written once.
// Before it: nothing; read it first.
// Limits: runs of one value, as in channels_last, divide for each value.
#include "channel_shuffle.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void channel_shuffle_plain_forward_cpu(const T* input, T* output, const ChannelShuffleShape& s,
                                       ParallelFor threads) {
  parallel_for(threads, s.images, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image)
      for (int64_t channel = 0; channel < s.channels; ++channel) {
        const T* from = input + (image * s.channels + s.source(channel)) * s.run;
        T* to = output + (image * s.channels + channel) * s.run;
        for (int64_t i = 0; i < s.run; ++i) to[i] = from[i];
      }
  });
}

#define FASTCONV_INSTANTIATE(T) \
  template void channel_shuffle_plain_forward_cpu<T>(const T*, T*, const ChannelShuffleShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY
