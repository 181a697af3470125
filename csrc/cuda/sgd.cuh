// torch.optim.SGD for each element, eq. 6: momentum, weight decay and the step, after the projection.
#pragma once

#include "arguments.h"
#include "numeric.cuh"

namespace mla_ext::cuda {

template <typename T>
struct Sgd {
  using A = accumulate_t<T>;

  T* weight;
  A* momentum_buffer;
  A lr, momentum, undamped, weight_decay, inverse_scale;
  bool nesterov, maximize, first_step;

  __device__ Sgd(T* weight, A* momentum_buffer, const Hyperparameters& hyper, const float* grad_scale, bool first_step)
      : weight(weight),
        momentum_buffer(momentum_buffer),
        lr(static_cast<A>(hyper.lr_tensor ? *hyper.lr_tensor : hyper.lr)),
        momentum(static_cast<A>(hyper.momentum)),
        undamped(static_cast<A>(1.0 - hyper.dampening)),
        weight_decay(static_cast<A>(hyper.weight_decay)),
        inverse_scale(grad_scale ? A(1) / static_cast<A>(*grad_scale) : A(1)),
        nesterov(hyper.nesterov),
        maximize(hyper.maximize),
        first_step(first_step) {}

  /// Steps the kWidth elements from `index` on with z, the projected gradient.
  template <int kWidth>
  __device__ void step(int64_t index, const Vector<A, kWidth>& z) const {
    Vector<T, kWidth> w = load<kWidth>(weight + index);
    // The first buffer is the gradient itself; what is in memory then may be anything.
    Vector<A, kWidth> b = {};
    if (momentum_buffer && !first_step) b = load<kWidth>(momentum_buffer + index);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      A g = z.at[i] * inverse_scale;
      if (maximize) g = -g;
      const A old = to_accumulate(w.at[i]);
      g += weight_decay * old;
      if (momentum_buffer) {
        b.at[i] = first_step ? g : momentum * b.at[i] + undamped * g;
        g = nesterov ? g + momentum * b.at[i] : b.at[i];
      }
      w.at[i] = from_accumulate<T>(old - lr * g);
    }
    if (momentum_buffer) store(momentum_buffer + index, b);
    store(weight + index, w);
  }

  __device__ void step(int64_t index, A z) const { step<1>(index, {z}); }
};

}  // namespace mla_ext::cuda
