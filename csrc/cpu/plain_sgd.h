// The step of the parameters that have no projection: torch.optim.SGD's, bit for bit, in one pass over memory.
#pragma once

#include "kernels.h"

namespace mla_ext::cpu {

// So few are not worth the wake of a thread: two take as long as one, with other work between the steps.
constexpr int64_t kElementsOfOneThread = 16384;

struct SgdTensor {
  void* weight;           // in place
  void* grad;             // in place: divided by the scale, where there is one
  void* momentum_buffer;  // in place, or null: no momentum
  int64_t begin;          // how many elements the tensors before this one have
  int64_t size;
  DType dtype;  // of all three: Float32 or Float64
};

struct PlainSgd {
  const SgdTensor* tensors;  // that share no memory, where they are more than one thread steps
  int64_t count;
  int64_t size;     // the elements of all
  bool first_step;  // the momentum buffers start as the gradients
  bool nesterov;
  bool maximize;
  bool fma;  // a * b + c is rounded once, as torch.add does on CPUs that can; else twice
  double grad_scale;
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
};

#ifdef MLA_EXT_ISA
namespace MLA_EXT_ISA {
void plain_sgd(const PlainSgd& step, ParallelFor parallel_for);
}
#endif

}  // namespace mla_ext::cpu
