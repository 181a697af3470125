// What only the CPU kernels have: the rank form, and the step of parameters without a projection.
#pragma once

#include "backend.h"
#include "cpu/plain_sgd.h"

namespace fuzz {

void rank_step(const HeadStep& step);
/// Compresses the rank form if it is full.
void settle(DType accumulate, const mla_ext::Projection& P, int64_t s);
void plain_sgd(const mla_ext::cpu::PlainSgd& step);

void try_rank_step(Input& input);
void try_compress(Input& input);
void try_eigen(Input& input);
void try_plain_sgd(Input& input);

}  // namespace fuzz
