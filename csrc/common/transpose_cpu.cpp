// Matrices whose axes change places, in squares of as many rows as a vector has lanes.
#include "transpose.h"

#include <algorithm>

#include "simd.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// Values [first, first + L) of a matrix, or a copy of those that exist.
template <typename T, int64_t L>
const T* read_run(const T* matrix, int64_t size, int64_t first, T (&copy)[L]) {
  if (first + L <= size) return matrix + first;
  std::copy(matrix + first, matrix + size, copy);
  return copy;
}

template <typename T>
void transpose_matrix(const T* source, T* target, int64_t rows, int64_t columns) {
  using A = accumulate_t<T>;
  constexpr int64_t L = lanes_of<A>;
  const int64_t size = rows * columns;
  T rest[L][L], edge[L][L], nowhere[L];
  for (int64_t c = 0; c < columns; c += L)
    for (int64_t r = 0; r < rows; r += L) {
      const int64_t high = std::min(L, rows - r), wide = std::min(L, columns - c);
      // Where a column of the square is shorter than a vector, the next column writes over what is too much.
      const auto is_written_in_place = [&](int64_t k) {
        return high == L || (rows < L && (c + k) * rows + L <= size);
      };
      transpose_square<A>(
          [&](int i) {
            const int64_t row = std::min<int64_t>(i, high - 1);
            return read_run(source, size, (r + row) * columns + c, rest[row]);
          },
          [&](int k) {
            if (k >= wide) return static_cast<T*>(nowhere);
            return is_written_in_place(k) ? target + (c + k) * rows + r : edge[k];
          });
      for (int64_t k = 0; k < wide; ++k)
        if (!is_written_in_place(k)) std::copy_n(edge[k], high, target + (c + k) * rows + r);
    }
}

}  // namespace

template <typename T>
void transpose_matrices(const T* source, T* target, int64_t count, int64_t rows, int64_t columns,
                        ParallelFor threads) {
  parallel_for(threads, count, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      transpose_matrix(source + k * rows * columns, target + k * rows * columns, rows, columns);
  });
}

#define FASTCONV_INSTANTIATE(T) \
  template void transpose_matrices(const T*, T*, int64_t, int64_t, int64_t, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY
