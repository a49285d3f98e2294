// Convolution, C++, direct, bfloat16: two channels in one step.
//
// Formula: conv2d.h. One step: VDPBF16PS multiplies a pair of channels of a pixel by a pair of weights in
//   each lane and adds both products to a float32 sum; the loops are conv2d_direct_pass_cpu.h's.
// Bytes: half of float32's. Against float32: half as many steps.
// Limits: compiled once, for the processors that have the instruction (multiplies_bfloat16()), which counts
//   subnormal values as zero; forward and transposed only.
#include "conv2d_direct_pass_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

void direct_convolve_pairs(const BFloat16* input, const BFloat16Pair* packed,
                           const Conv2dEpilogue<BFloat16>& epilogue, BFloat16* output,
                           const Conv2dShape& shape, bool transposed, const RowSource& source,
                           ParallelFor threads) {
  DirectPass pass = transposed ? direct_transposed(shape) : direct_forward(shape);
  pass.source = source;
  const Direct<BFloat16, BFloat16Pair> direct(input, packed, epilogue, output, pass);
  parallel_for(threads, direct.items(), [&](int64_t begin, int64_t end) { direct.compute(begin, end); });
}

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY
