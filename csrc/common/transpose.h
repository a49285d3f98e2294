// Matrices whose axes change places: how a weight in channels_last order becomes contiguous, and back.
#pragma once

#include "cpu.h"
#include "types.h"

namespace fastconv {

// source (count, rows, columns), target (count, columns, rows). T: float, double, BFloat16, Float16.
FASTCONV_DECLARE_CPU(template <typename T> void transpose_matrices(const T* source, T* target, int64_t count,
                                                                   int64_t rows, int64_t columns,
                                                                   ParallelFor threads);)

}  // namespace fastconv
