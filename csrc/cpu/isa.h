// Which build of the kernels this machine runs.
#pragma once

#include "kernels.h"

namespace mla_ext::cpu {

// The kernels for the widest instruction set here, or for the one named by the environment variable MLA_EXT_CPU_ISA
// (baseline, avx2, avx512). Throws std::runtime_error when that one is unknown or cannot run here.
const Kernels& kernels();

// Whether PyTorch's BLAS makes the product of (rows, s) with P (s, s) faster than kernels().project.
bool blas_is_faster(int64_t rows, int64_t s);

// The name of that instruction set.
const char* isa_name();

}  // namespace mla_ext::cpu
