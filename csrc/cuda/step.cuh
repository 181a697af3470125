// What the kernels of a head step are given, whatever the form of P.
#pragma once

#include "arguments.h"
#include "numeric.cuh"

namespace mla_ext::cuda {

template <typename T>
struct StepArguments {
  using A = accumulate_t<T>;

  T* weight;
  const T* grad;
  A* momentum_buffer;
  const A* feature_mean;
  float* step;
  int C, s;
  Hyperparameters hyper;
  const float* grad_scale;
  const float* found_inf;

  explicit StepArguments(const HeadStep& of)
      : weight(static_cast<T*>(of.weight)),
        grad(static_cast<const T*>(of.grad)),
        momentum_buffer(static_cast<A*>(of.momentum_buffer)),
        feature_mean(static_cast<const A*>(of.feature_mean)),
        step(of.step),
        C(static_cast<int>(of.C)),
        s(static_cast<int>(of.s)),
        hyper(of.hyper),
        grad_scale(of.grad_scale),
        found_inf(of.found_inf) {}

  /// Whether vectors of A and of T start at the same columns in every row of a matrix (rows, s).
  bool has_aligned_rows() const {
    return s % kVector<A> == 0 && s % kVector<T> == 0 && is_vector_aligned(grad) && is_vector_aligned(feature_mean) &&
           is_vector_aligned(weight) && is_vector_aligned(momentum_buffer);
  }

  __device__ bool skipped() const { return found_inf && *found_inf != 0.0f; }
  __device__ bool first_step() const { return step && *step == 0.0f; }
};

template <typename A>
__device__ inline A alpha_of(const Hyperparameters& hyper) {
  return static_cast<A>(hyper.alpha_tensor ? *hyper.alpha_tensor : hyper.alpha);
}

}  // namespace mla_ext::cuda
