// The most arithmetic that one thread reaches with an instruction set: what a kernel's speed is held against.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace fastconv {

// Runs `steps` rounds of independent multiply-adds in registers; `operations` gets how many that was, two for
// each multiply-add. T: float, double.
FASTCONV_DECLARE_CPU(template <typename T> void multiply_add(int64_t steps, int64_t& operations);)

}  // namespace fastconv
