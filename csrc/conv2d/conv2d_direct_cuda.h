// What the direct CUDA kernels of dense convolution share: a patch of the source in shared memory.
#pragma once

#include "conv2d_cuda.h"

namespace fastconv {

constexpr int direct_shared_bytes = 48 << 10;        // so that four blocks share a multiprocessor
constexpr int direct_most_shared_bytes = 160 << 10;  // what a block can have from compute capability 8.0 on

struct Patch {
  int channels, rows, columns;
  int pitch, plane;  // values from one row, and one channel, to the next
};

// A row more than a multiple of two, so that rows start in different banks; a channel in bank 4, 12, 20 or 28
// after the one before, so that neighbouring channels (and 4 columns) of a channels_last image do.
inline Patch patch_of(int channels, int rows, int columns) {
  Patch p{channels, rows, columns, columns | 1, 0};
  p.plane = (rows * p.pitch + 11) / 8 * 8 - 4;
  return p;
}

// Fills a patch, converted to the type of the sums: channels from `first` to `last`, pixels from (row,
// column) on, zero outside the image. A warp takes a row at a time.
template <typename T>
__device__ __forceinline__ void fill_patch(accumulate_t<T>* to, const Patch& patch, const T* image,
                                           const Strides& step, int height, int width, bool channels_last,
                                           int64_t first, int64_t last, int row, int column) {
  const int lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
  const int lines = channels_last ? patch.rows : patch.rows * patch.channels;
  for (int line = int(threadIdx.x) / 32; line < lines; line += warps) {
    const int y = line % patch.rows;
    const bool inside = row + y >= 0 && row + y < height;
    const T* from = image + (row + y) * step.row;
    if (channels_last) {  // lanes: 8 channels of 4 columns
      for (int x = lane / 8; x < patch.columns; x += 4) {
        const bool active = inside && column + x >= 0 && column + x < width;
        for (int c = lane % 8; c < patch.channels; c += 8) {
          const T value =
              load_global(from + (column + x) * step.column + first + c, active && first + c < last);
          store_shared(to + c * patch.plane + y * patch.pitch + x, load(value));
        }
      }
    } else {
      const int c = line / patch.rows;
      from += (first + c) * step.channel + column;
      for (int x = lane; x < patch.columns; x += 32) {
        const bool active = inside && first + c < last && column + x >= 0 && column + x < width;
        store_shared(to + c * patch.plane + y * patch.pitch + x, load(load_global(from + x, active)));
      }
    }
  }
}

// Any pass, forward or transposed, by the direct kernel; false where no patch fits in shared memory.
template <typename T>
bool conv2d_direct_pass_cuda(const T* source, const T* weight, const Conv2dEpilogue<T>& epilogue, T* result,
                             const Conv2dPass& pass, void* stream);

}  // namespace fastconv
